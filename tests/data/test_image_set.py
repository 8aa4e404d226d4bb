import numpy as np
import pytest
import torch
from fake_cifar import statistics

from fastcifar.data.image_set import ImageSet
from fastcifar.errors import DataError

IMAGES, LABELS = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.float(), LABELS, "expected uint8"),
        (IMAGES.permute(0, 3, 1, 2), LABELS, "expected uint8"),
        (IMAGES, LABELS.float(), "expected int64"),
        (IMAGES, torch.zeros(3, dtype=torch.int64), r"int64 \(2,\)"),
        (IMAGES, torch.tensor([0, 2]), "expected 0 to 1"),
    ],
    ids=["float-images", "nchw", "float-labels", "too-many-labels", "label-out-of-range"],
)
def test_sets_are_checked_where_they_are_built(images, labels, message):
    with pytest.raises(DataError, match=message):
        ImageSet(images, labels, ("a", "b"), (0, 0, 0), (1, 1, 1))


def test_any_arrays_make_a_set_of_images():
    images = np.random.default_rng(0).integers(0, 256, (30, 9, 12, 3), dtype=np.uint8)
    own = ImageSet.of(images, [i % 3 for i in range(30)])
    mean, std = statistics(own.images)
    assert own.classes == ("0", "1", "2")
    assert own.mean == pytest.approx(mean)
    assert own.std == pytest.approx(std)
    for wrong in (images.astype(np.float32), images[0], images[:0]):
        with pytest.raises(DataError, match="expected uint8"):
            ImageSet.of(wrong, [0] * len(wrong))
