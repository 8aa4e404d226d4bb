"""A sample's looks depend on the seed, the epoch and the sample alone."""

import pytest
import torch
from torch.nn.functional import one_hot

import fastcifar
from fastcifar.augment import BACKENDS
from fastcifar.augment.policy import parse
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import sample
from fastcifar.data import loader as data_loader
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.errors import ConfigError, FastcifarError

COUNT = 205


@pytest.fixture(scope="module")
def dataset() -> ImageSet:
    """Draws images whose labels are their places in the set."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(COUNT), tuple(map(str, range(COUNT))), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def epoch(loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def loader(dataset: ImageSet, **options) -> Loader:
    return Loader(dataset, **{"batch_size": 20, "device": "cpu", "dtype": torch.uint8, **options})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch_size", "chunk_size"), [(64, None), (7, 20), (205, 1000)])
def test_same_images_whatever_the_batch_the_chunk_and_the_backend(dataset, backend, batch_size, chunk_size):
    expected = epoch(loader(dataset, backend="torch"))
    got = epoch(loader(dataset, backend=backend, batch_size=batch_size, chunk_size=chunk_size))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "policy",
    ["standard", "transform2,cutout:2x6", "transform1_reflect", "standard,cutmix", "autoaugment,greyscale:0.2"],
)
def test_a_gpu_gives_the_images_of_a_cpu(dataset, backend, policy):
    expected = epoch(loader(dataset, policy=policy, backend="torch"))
    got = epoch(loader(dataset, policy=policy, backend=backend, device="cuda", chunk_size=40))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))


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


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "expected"),
    [
        (20, False, [20] * 10 + [5]),
        (20, True, [20] * 10),
        (41, True, [41] * 5),
        (205, True, [205]),
        (1000, False, [205]),
    ],
)
def test_length_is_the_number_of_batches(dataset, batch_size, drop_last, expected):
    chosen = loader(dataset, batch_size=batch_size, drop_last=drop_last)
    assert [len(labels) for _, labels in chosen] == expected
    assert len(chosen) == len(expected)


def test_without_shuffling_and_policy_the_images_come_as_they_are(dataset):
    images, labels = epoch(loader(dataset, policy="none", shuffle=False))
    assert torch.equal(labels, dataset.labels)
    assert torch.equal(images.permute(0, 2, 3, 1), dataset.images)
    normalised = next(
        iter(fastcifar.Loader(dataset, "none", batch_size=64, device="cpu", normalize="half", shuffle=False))
    )[0]
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalised, images[:64] / 127.5 - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "from 1 to 205"),
        ({"batch_size": 206, "drop_last": True}, "from 1 to 205"),
        ({"mask": torch.zeros(COUNT, dtype=torch.bool)}, "leave at least one"),
        ({"mask": torch.ones(COUNT)}, r"mask is torch.float32 \(205,\); expected bool"),
        ({"weights": -torch.ones(COUNT)}, "none of them negative"),
        ({"weights": torch.zeros(COUNT)}, "no finite sum above 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"chunk_size": 0}, "chunk size 0"),
        ({"backend": "dally"}, "did you mean dali"),
        ({"policy": "strandard"}, "did you mean standard"),
        ({"normalize": "kuang"}, "did you mean kuangliu"),
        ({"device": "mps"}, "device 'mps' is not supported"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_one_sentence(dataset, options, message):
    with pytest.raises(ConfigError, match=message):
        loader(dataset, **options)


def test_ranks_share_the_epoch(dataset):
    """Together the ranks see what one process sees, in turn; what does not divide evenly is left out."""
    whole = epoch(loader(dataset, policy="transform2"))
    ranks = [epoch(loader(dataset, policy="transform2", batch_size=9, rank=rank, world_size=3)) for rank in range(3)]
    for part in (0, 1):
        interleaved = torch.stack([rank[part] for rank in ranks], dim=1).flatten(0, 1)
        assert torch.equal(interleaved, whole[part][: COUNT // 3 * 3])


def test_a_mask_takes_samples_without_changing_them(dataset):
    mask = dataset.labels % 3 == 0
    images, labels = epoch(loader(dataset, mask=mask))
    assert torch.equal(labels.sort().values, mask.nonzero()[:, 0])
    all_images, all_labels = epoch(loader(dataset))
    place = {int(label): i for i, label in enumerate(all_labels)}
    assert torch.equal(images, all_images[[place[int(label)] for label in labels]])


def test_weights_decide_how_often_samples_are_drawn(dataset):
    weights = torch.zeros(COUNT)
    weights[3], weights[200] = 1, 3
    labels = torch.cat([epoch(loader(dataset, weights=weights, seed=seed))[1] for seed in range(20)])
    assert set(labels.tolist()) == {3, 200}
    assert 0.7 < float((labels == 200).float().mean()) < 0.8


@pytest.mark.parametrize("kind", ["mixup:0.4", "cutmix"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_images_are_blends_of_the_augmented_ones(dataset, kind, backend):
    """The batch and chunk size do not matter, and labels are the shares."""
    policy = parse(f"standard,{kind}")
    images, labels = epoch(loader(dataset, policy=policy, backend=backend, batch_size=64, chunk_size=70))
    plain_images, order = epoch(loader(dataset, policy="standard"))
    plain = plain_images[order.argsort()].int()
    mixing = sample(policy, Key(0, 0), order, (32, 32), COUNT).mixing
    shares = (mixing.share / 256)[:, None]
    torch.testing.assert_close(labels, one_hot(order, COUNT) * shares + one_hot(mixing.partner, COUNT) * (1 - shares))
    own, other, share = plain[order], plain[mixing.partner], mixing.share[:, None, None, None]
    if mixing.box is None:
        assert torch.equal(images.int(), (own * share + other * (256 - share) + 128) // 256)
    else:
        for image, partner, (top, left, bottom, right) in zip(own, other, mixing.box.tolist(), strict=True):
            image[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
        assert torch.equal(images.int(), own)


def test_mixed_floats_are_blends_too(dataset):
    bytes_, floats = (
        epoch(loader(dataset, policy="mixup", dtype=dtype, normalize="none"))[0]
        for dtype in (torch.uint8, torch.float32)
    )
    assert float((bytes_ / 255 - floats).abs().max()) <= 0.5 / 255 + 1e-6


def test_one_epoch_at_a_time(dataset):
    chosen = loader(dataset, chunk_size=20)
    first = iter(chosen)
    next(first)
    second = list(chosen)
    assert torch.equal(torch.cat([labels for _, labels in second]), epoch_labels(dataset, 1))
    with pytest.raises(FastcifarError, match="make a second Loader"):
        list(first)


def epoch_labels(dataset: ImageSet, number: int) -> torch.Tensor:
    return torch.cat([labels for _, labels in loader(dataset).batches(number)])


def test_an_interrupted_chunk_does_not_spoil_the_next_epoch(dataset, monkeypatch):
    chosen = loader(dataset)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chosen.applier, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chosen)
    assert len(list(chosen)) == len(chosen)


def test_on_a_gpu_the_next_chunk_is_always_under_way(gpu, dataset, monkeypatch):
    """The first chunk of the next epoch is too; all work is on the loader's own stream, which waits for no training."""
    chosen, made = loader(dataset, device="cuda", backend="triton", batch_size=20, chunk_size=100), []
    for name in ("submit", "collect"):
        watch(chosen.applier, name, made, monkeypatch)
    trained = torch.cuda.Stream()
    with gpu.steady():
        for _ in range(2):
            for images, _ in chosen:
                with torch.cuda.stream(trained):
                    trained.wait_stream(torch.cuda.default_stream())
                    images.sum()
    assert [name for name, _ in made] == ["submit"] + ["collect", "submit"] * 6
    assert {stream for _, stream in made} == {chosen.stream}
    assert trained not in chosen.stream.clock


def watch(applier, name, made, monkeypatch):
    """Notes each call of a method and the current stream."""
    genuine = getattr(applier, name)

    def noted(*arguments):
        made.append((name, torch.cuda.current_stream()))
        return genuine(*arguments)

    monkeypatch.setattr(applier, name, noted)


@pytest.mark.parametrize(
    ("device", "works", "expected"), [("cuda", True, "dali"), ("cuda", False, "triton"), ("cpu", True, "torch")]
)
def test_the_backend_that_suits_the_device(monkeypatch, device, works, expected):
    monkeypatch.setattr(data_loader, "dali_works", lambda device: works)
    assert data_loader.resolve_backend("auto", torch.device(device)) == expected


def test_mixing_draws_each_sample_once(dataset, monkeypatch):
    drawn = []

    def noted(policy, key, index, *rest):
        drawn.append(len(index))
        return sample(policy, key, index, *rest)

    monkeypatch.setattr(data_loader, "sample", noted)
    epoch(loader(dataset, policy="standard,mixup", chunk_size=COUNT))
    assert drawn == [2 * 200, 2 * 5]
