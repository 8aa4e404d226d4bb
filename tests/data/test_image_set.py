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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ant", "ant"), "two classes are called 'ant'; give each"),
        (("ant", ""), "called ''"),
        (("ant", 3), "called '3'"),
    ],
)
def test_names_of_classes(names, message):
    with pytest.raises(DataError, match=message):
        ImageSet.of(IMAGES, [0, 1], names)


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


def test_a_digest_tells_any_other_images_or_labels(gpu):
    images = torch.arange(96, dtype=torch.uint8).reshape(2, 4, 4, 3)
    one = ImageSet.of(images, [0, 1])
    same = ImageSet.of(images.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), [0, 1], ["a", "b"])
    assert one.digest() == same.digest() == one.to("cuda").digest()
    flipped = images.clone()
    flipped[1, 3, 3, 2] ^= 1
    others = [(flipped, [0, 1]), (images, [1, 0]), (images.reshape(2, 2, 8, 3), [0, 1]), (images.flip(0), [0, 1])]
    assert len({one.digest(), *(ImageSet.of(*other).digest() for other in others)}) == 5
