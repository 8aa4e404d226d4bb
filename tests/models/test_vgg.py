"""VGG against torchvision's with the same weights."""

import torch
import torchvision
from copied_weights import randomise_norms, weighted
from torch import nn

from fastcifar.models.vgg import vgg


def test_equals_torchvisions_with_one_linear_layer_and_no_biases():
    ours, theirs = vgg(depths=(2, 2, 4, 4, 4), classes=7, image_size=32), torchvision.models.vgg19_bn(num_classes=7)
    theirs.avgpool, theirs.classifier = nn.Identity(), nn.Linear(512, 7)
    randomise_norms(theirs)
    for target, source in zip(weighted(ours), weighted(theirs), strict=True):
        if isinstance(source, nn.Conv2d):
            nn.init.zeros_(source.bias)
        target.load_state_dict({key: source.state_dict()[key] for key in target.state_dict()})
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours.double().eval()(images), theirs.double().eval()(images))
