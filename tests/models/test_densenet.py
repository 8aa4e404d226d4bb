"""DenseNet against torchvision's with the same weights."""

import torch
import torchvision
from copied_weights import assert_same_training_step, copy_weights
from torch import nn

from fastcifar.models.densenet import densenet


def test_equals_torchvisions_with_a_stem_for_small_images():
    ours = densenet(blocks=(2, 3, 1), growth=8, classes=7, image_size=20)
    theirs = torchvision.models.DenseNet(8, (2, 3, 1), 16, num_classes=7)
    theirs.features.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(theirs.features, name, nn.Identity())
    copy_weights(ours, theirs)
    assert_same_training_step(ours, theirs, torch.randn(4, 3, 20, 20))
