"""The loader's promises: what a sample looks like depends on the seed, the epoch and the sample alone."""

import pytest
import torch

import fastcifar
from fastcifar.augment import BACKENDS
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.errors import ConfigError, DataError

COUNT = 205


@pytest.fixture(scope="module")
def dataset() -> ImageSet:
    """Images whose first pixel stays recognisable is not needed: labels are the sample's own index."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(COUNT), tuple(map(str, range(COUNT))), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def epoch(loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def loader(dataset: ImageSet, **options) -> Loader:
    return Loader(dataset, **{"batch_size": 20, "device": "cpu", "dtype": torch.uint8, **options})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch_size", "chunk_size"), [(64, None), (7, 20), (1, 1), (205, 1000), (50, 50)])
def test_same_images_whatever_the_batch_the_chunk_and_the_backend(dataset, backend, batch_size, chunk_size):
    expected = epoch(loader(dataset, backend="torch"))
    got = epoch(loader(dataset, backend=backend, batch_size=batch_size, chunk_size=chunk_size))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_epoch_is_every_sample_once_in_a_new_order(dataset):
    chosen = loader(dataset)
    first, second = epoch(chosen)[1], epoch(chosen)[1]
    assert torch.equal(first.sort().values, torch.arange(COUNT))
    assert not torch.equal(first, second)


def test_epochs_repeat_from_the_seed_and_resume_in_the_middle(dataset):
    chosen = loader(dataset, seed=9)
    epochs = [list(chosen) for _ in range(2)]
    again = loader(dataset, seed=9)
    for start in (0, 3, 10):
        resumed = list(again.batches(1, start))
        assert len(resumed) == len(epochs[1]) - start
        for batch, expected in zip(resumed, epochs[1][start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))
    assert list(again.batches(1, 11)) == []


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 20, 41, 205])
def test_length_is_the_number_of_batches(dataset, drop_last, batch_size):
    chosen = loader(dataset, batch_size=batch_size, drop_last=drop_last)
    sizes = [len(labels) for _, labels in chosen]
    assert len(sizes) == len(chosen)
    assert set(sizes[:-1]) <= {batch_size}
    assert sum(sizes) == (COUNT // batch_size * batch_size if drop_last else COUNT)


def test_without_shuffling_and_policy_the_images_come_as_they_are(dataset):
    images, labels = epoch(loader(dataset, policy="none", shuffle=False))
    assert torch.equal(labels, dataset.labels)
    assert torch.equal(images.permute(0, 2, 3, 1), dataset.images)


def test_public_interface_gives_normalised_channels_last(dataset):
    batches = fastcifar.Loader(dataset, policy="standard", batch_size=64, device="cpu", normalize="half")
    images, labels = next(iter(batches))
    assert images.dtype == torch.float32
    assert images.shape == (64, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert float(images.min()) == -1
    assert float(images.max()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "from 1 to 205"),
        ({"batch_size": 206}, "from 1 to 205"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"chunk_size": 0}, "chunk size 0"),
        ({"backend": "dally"}, "did you mean dali"),
        ({"policy": "strandard"}, "did you mean standard"),
        ({"normalize": "kuang"}, "did you mean kuangliu"),
        pytest.param({"device": "cuda"}, "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_one_sentence(dataset, options, message):
    with pytest.raises(ConfigError, match=message):
        loader(dataset, **options)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 4, 4, 3), torch.zeros(2, dtype=torch.int64), "expected uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "expected uint8"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2), "expected int64"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"int64 \(2,\)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 2]), "expected 0 to 1"),
    ],
    ids=["float-images", "nchw", "float-labels", "too-many-labels", "label-out-of-range"],
)
def test_image_sets_are_checked_where_they_are_built(images, labels, message):
    with pytest.raises(DataError, match=message):
        ImageSet(images, labels, ("a", "b"), (0, 0, 0), (1, 1, 1))
