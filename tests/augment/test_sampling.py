"""The draws are uniform where they should be, independent, and as frequent as the policies' definitions say."""

import numpy as np
import pytest
import torch

from fastcifar.augment import automatic
from fastcifar.augment.automatic import Operation
from fastcifar.augment.policy import parse
from fastcifar.augment.random import Key, Stream, draw
from fastcifar.augment.sampling import Params, beta, sample
from fastcifar.kernels.warp import ONE

COUNT = 50_000
INDEX = torch.arange(COUNT)


def quantile_99_9(degrees: int) -> float:
    """Approximates the chi-square quantile (Wilson and Hilferty), good to 1% from one degree of freedom on."""
    return degrees * (1 - 2 / (9 * degrees) + 3.0902 * (2 / (9 * degrees)) ** 0.5) ** 3


def assert_frequencies(drawn: torch.Tensor, probabilities: list[float] | torch.Tensor) -> None:
    expected = torch.as_tensor(probabilities, dtype=torch.float64) * len(drawn)
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    possible = expected > 0
    statistic = float(((counts - expected) ** 2 / expected)[possible].sum())
    assert statistic < quantile_99_9(int(possible.sum()) - 1)


def draw_all(text: str, epoch: int = 1, index: torch.Tensor = INDEX) -> Params:
    return sample(parse(text), Key(0, epoch), index, (32, 32), COUNT)


def shifts_and_flips(params: Params) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws rows down, columns right and mirror images of a `standard` policy on 32x32 images."""
    a, _, c, _, _, f = params.warp.long().unbind(1)
    flip = (a < 0).long()
    return f >> 16, (c >> 16) - 31 * flip, flip


def test_shift_and_flip_are_uniform_and_independent():
    y, x, flip = shifts_and_flips(draw_all("standard"))
    y, x = y + 4, x + 4
    for drawn, values in ((y, 9), (x, 9), (flip, 2), (y * 9 + x, 81), ((y * 9 + x) * 2 + flip, 162)):
        assert_frequencies(drawn, [1 / values] * values)


def test_successive_epochs_and_samples_are_uncorrelated():
    epochs = torch.stack([shifts_and_flips(draw_all("standard", epoch))[0].double() for epoch in range(3)])
    neighbours = torch.stack([epochs[0, :-1], epochs[0, 1:]])
    for pair in (epochs[:2], epochs[1:], neighbours):
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / COUNT**0.5


def test_streams_are_uncorrelated():
    words = torch.cat([draw(Key(0, 1), stream, INDEX[:20_000]) for stream in Stream], dim=1).double().T
    correlation = torch.corrcoef(words) - torch.eye(len(words))
    assert float(correlation.abs().max()) < 5 / 20_000**0.5


def test_affine_parameters_are_uniform_within_their_ranges():
    params = draw_all("rotate:30,translate:0.25,shear:10")
    a, b, d, e = (params.warp[:, column].double() / ONE for column in (0, 1, 3, 4))
    angle = torch.rad2deg(torch.atan2(d, e))
    assert_frequencies(((angle + 30) / 60 * 20).long().clamp(0, 19), [1 / 20] * 20)
    assert float(angle.abs().max()) == pytest.approx(30, abs=0.01)
    determinant = a * e - b * d
    torch.testing.assert_close(determinant, torch.ones_like(determinant), atol=1e-4, rtol=0)


def test_quarter_turns_are_exact_and_uniform():
    warp = draw_all("turns").warp
    assert set(warp[:, [0, 1, 3, 4]].flatten().tolist()) == {0, ONE, -ONE}
    turn = (warp[:, 0] == 0) * (1 + 2 * (warp[:, 1] > 0)) + 2 * (warp[:, 0] < 0)
    assert_frequencies(turn.long(), [1 / 4] * 4)


def test_alternating_flips_show_each_image_both_ways_in_two_epochs():
    flips = [shifts_and_flips(draw_all("flip:alternating", epoch))[2] for epoch in range(4)]
    assert torch.equal(flips[0], 1 - flips[1])
    assert torch.equal(flips[0], flips[2])
    assert_frequencies(flips[0], [1 / 2] * 2)


@pytest.mark.parametrize("name", ["autoaugment", "autoaugment_tv", "trivialaugment", "randaugment"])
def test_operations_come_as_often_as_the_definition_says(name):
    table = getattr(automatic, name)((32, 32))
    for turn, slot in enumerate(draw_all(name).slots):
        choices = [branch[turn % len(branch)] for branch in table.branches]
        expected = torch.zeros(len(Operation), dtype=torch.float64)
        for choice in choices:
            expected[choice.operation] += choice.probability / len(choices)
        expected[Operation.IDENTITY] += 1 - expected.sum()
        assert_frequencies(slot.operation, expected)


def test_sub_policies_are_drawn_whole():
    """Compares pairs of operations with the products of the probabilities in each sub-policy."""
    first, second = draw_all("autoaugment").slots
    count = len(Operation)
    expected = torch.zeros(count * count, dtype=torch.float64)
    for one, two in automatic.autoaugment((32, 32)).branches:
        for a, p in ((one.operation, one.probability), (0, 1 - one.probability)):
            for b, q in ((two.operation, two.probability), (0, 1 - two.probability)):
                expected[a * count + b] += p * q / 25
    assert_frequencies(first.operation * count + second.operation, expected)


def test_values_take_either_sign_and_every_level():
    slot = draw_all("trivialaugment").slots[0]
    values = slot.value[slot.operation == Operation.SHEAR_X]
    levels = torch.round(values / 0.99 * 30).long() + 30
    expected = torch.ones(61, dtype=torch.float64) / 62
    expected[30] *= 2
    assert_frequencies(levels, expected)


def test_cutout_centres_are_uniform_and_squares_clipped():
    boxes = draw_all("cutout:2x8").boxes
    assert boxes.shape == (COUNT, 2, 4)
    top, left, bottom, right = boxes.long().unbind(2)
    assert int(top.min()) == int(left.min()) == 0
    assert int(bottom.max()) == int(right.max()) == 32
    assert int((bottom - top).min()) == 4
    centre = torch.where(top == 0, bottom - 4, top + 4)[:, 1]
    assert_frequencies(centre, [1 / 32] * 32)


def test_coarse_dropout_has_whole_squares_half_of_the_time():
    top, left, bottom, right = draw_all("coarse:8x8:0.5").boxes.long().unbind(2)
    area = (bottom - top) * (right - left)
    assert set(area.flatten().tolist()) == {0, 64}
    assert_frequencies((area[:, 0] > 0).long(), [1 / 2] * 2)
    assert torch.equal(area[:, 0] > 0, area[:, 7] > 0)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha):
    """Applies the Kolmogorov-Smirnov test against NumPy's generator."""
    generator = torch.Generator().manual_seed(1)
    ours = np.sort(beta(torch.rand(20_000, dtype=torch.float64, generator=generator), alpha).numpy())
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 20_000))
    both = np.concatenate((ours, theirs))
    gap = np.abs(np.searchsorted(ours, both, side="right") - np.searchsorted(theirs, both, side="right")).max() / 20_000
    assert gap < 1.95 * (2 / 20_000) ** 0.5


def test_mixing_partners_are_uniform_and_cutmix_shares_are_the_exact_areas():
    mixing = draw_all("cutmix").mixing
    assert_frequencies(mixing.partner // 500, [1 / 100] * 100)
    top, left, bottom, right = mixing.box.unbind(1)
    pasted = (bottom - top) * (right - left) / 1024
    assert float((mixing.share / 256 - (1 - pasted)).abs().max()) <= 0.5 / 256
    assert 0.3 < float(pasted.mean()) < 0.45


def test_rows_depend_on_their_sample_alone():
    text = "transform2,autoaugment,greyscale:0.5,intensity,cutout:3x5,cutmix"
    whole, part = draw_all(text), draw_all(text, index=INDEX[700:900])
    for drawn, alone in zip(tensors(whole), tensors(part), strict=True):
        assert torch.equal(drawn[700:900], alone)


def tensors(params: Params) -> list[torch.Tensor]:
    slots = [tensor for slot in params.slots for tensor in (slot.operation, slot.value, slot.warp)]
    return [
        params.warp,
        params.grey,
        params.intensity,
        params.boxes,
        params.mixing.partner,
        params.mixing.share,
        *slots,
    ]
