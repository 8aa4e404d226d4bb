"""The generator against published vectors and Triton's, and the statistics of what is drawn from it."""

import torch

from fastcifar.augment.random import Key, Stream, below, draw, philox


def test_published_vectors():
    """Uses Random123's known answers for Philox 4x32-10 that have the two high counter words at zero."""
    assert philox(0, torch.tensor([0]))[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_equals_tritons_generator():
    """The expected numbers are those of `tl.randint4x(5 << 32 | 42, offset)` in Triton 3.9."""
    words = {
        4294968273: [0x3E109C8D, 0x18553DCF, 0xDB5FC08B, 0x8A0FD40D],
        8589936546: [0x6E379812, 0x5023874A, 0xDB14DA18, 0xF93A7119],
        61551: [0x3342699E, 0xD5BAC077, 0xFB435877, 0xFE292B1C],
    }
    assert philox(5 << 32 | 42, torch.tensor(list(words))).tolist() == list(words.values())


def test_draws_depend_on_seed_epoch_sample_and_nothing_else():
    index = torch.arange(100)
    words = draw(Key(3, 5), Stream.CROP_AND_FLIP, index)
    assert torch.equal(words[40:60], draw(Key(3, 5), Stream.CROP_AND_FLIP, index[40:60]))
    for other in (Key(3, 6), Key(4, 5)):
        assert not torch.equal(words, draw(other, Stream.CROP_AND_FLIP, index))


def test_below_reaches_both_ends():
    words = torch.tensor([0, 2**32 - 1])
    assert below(words, 9).tolist() == [0, 8]
