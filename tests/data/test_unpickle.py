from __future__ import annotations

import os
import pickle
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.data.unpickle import unpickle
from fastcifar.errors import DataError

BATCH = {
    b"data": np.arange(12, dtype=np.uint8).reshape(3, 4),
    b"labels": [0, 1, 2],
    b"name": "b",
    b"more": (None, True, 1.5, {}),
}
PICKLE = pickle.dumps(BATCH, protocol=4)


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def python2_array(
    shape: tuple[int, ...], code: bytes = b"u1", order: bytes = b"|", content: bytes = b"abcdef"
) -> bytes:
    """An array as Python 2 and numpy 1 pickle it, opcode by opcode, and as CIFAR's batches have it."""
    text = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731
    number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731
    dtype = (
        b"cnumpy\ndtype\nq\x02("
        + text(code)
        + b"K\x00K\x01tR(K\x03"
        + text(order)
        + b"NNN"
        + number(-1)
        + number(-1)
        + b"K\x00tb"
    )
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87Rq\x01"
    return (
        b"\x80\x02" + made + b"(K\x01(" + b"".join(map(number, shape)) + b"t" + dtype + b"\x89" + text(content) + b"tb."
    )


HOSTILE = {
    "os.system": pickle.dumps(Reduced(os.system, "true"), protocol=2),
    "builtins.eval": pickle.dumps(Reduced(eval, "1"), protocol=4),
    "getattr": pickle.dumps(Reduced(getattr, "a", "b"), protocol=4),
    "numpy function": pickle.dumps(Reduced(np.zeros, (10**12,)), protocol=4),
    "numpy frombuffer of protocol 5": pickle.dumps(np.zeros(3), protocol=5),
    "numpy load": b"\x80\x02cnumpy\nload\nU\x04/etc\x85R.",
    "instance of a class": pickle.dumps(Reduced(Reduced), protocol=2),
    "codecs": pickle.dumps(b"a", protocol=2),
    "set": pickle.dumps({1, 2}, protocol=4),
    "object dtype": pickle.dumps(np.array([object], dtype=object), protocol=4),
    "structured dtype": pickle.dumps(np.zeros(2, dtype=[("a", "u1")]), protocol=4),
    "date dtype": pickle.dumps(np.zeros(2, dtype="M8[s]"), protocol=4),
    "text dtype": pickle.dumps(np.array(["ab"]), protocol=4),
    "numpy name with a dot": b"\x80\x04\x8c\x05numpy\x8c\x12dtype.__subclasses__\x93.",
    "module and attribute of the wrong type": b"\x80\x04K\x01K\x02\x93.",
    "bare ndarray": b"\x80\x02cnumpy\nndarray\n.",
    "ndarray called": b"\x80\x02cnumpy\nndarray\nK\x05\x85\x85R.",
    "dtype called twice": b"\x80\x02cnumpy\ndtype\nU\x02u1\x85RU\x02u1\x85R.",
    "dtype without state": b"\x80\x02cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R.",
    "array of an ndarray's subclass": python2_array((6,)).replace(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"),
    "array without state": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",
    "state set twice": python2_array((6,))[:-1] + b"Nb.",
    "array taken from the memo before its state": python2_array((6,))[:-1] + b"h\x01\x86.",
    "state of a list": b"\x80\x02]}b.",
    "state of a function": b"\x80\x02cnumpy\ndtype\n}U\x08__code__Nsb.",
    "shape larger than the contents": python2_array((7,)),
    "shape smaller than the contents": python2_array((5,)),
    "negative shape": python2_array((-2, -3)),
    "empty shape": python2_array(()),
    "huge shape": python2_array((2**31 - 1,) * 8),
    "too many dimensions": python2_array((1,) * 40 + (6,)),
    "unknown dtype": python2_array((6,), code=b"O8"),
    "unknown byte order": python2_array((6,), order=b"!"),
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\xff0.",
    "memo index never put": b"\x80\x02h\x05.",
    "memo of an empty stack": b"\x80\x02q\x00.",
    "nested tuple as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "number as a key": b"\x80\x02}K\x01K\x02s.",
    "list as a key": b"\x80\x02}]Ns.",
    "unequal keys and values": b"\x80\x02}(U\x01aNU\x01bu.",
    "append to a tuple": b"\x80\x02)Na.",
    "append to nothing": b"\x80\x02Na.",
    "no mark": b"\x80\x02K\x01t.",
    "mark left open": b"\x80\x02(K\x01.",
    "two values": b"\x80\x02NN.",
    "no value": b"\x80\x02.",
    "no stop": b"\x80\x02N",
    "nothing": b"",
    "persistent identifier": b"\x80\x02U\x01aQ.",
    "extension registry": b"\x80\x02\x82\x01.",
    "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "old instance": b"(inumpy\nndarray\n.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "unknown opcode": b"\x80\x02\xff.",
    "huge string": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "string of negative length": b"\x80\x02T" + struct.pack("<i", -1) + b".",
    "text that is no utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "name that is no ascii": b"\x80\x02c\xff\n\xff\n.",
    "not a pickle": b"<!DOCTYPE html><html>",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_refuses(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^somewhere is not a sound CIFAR batch: .*fetch the data set again.$"):
        unpickle(data, "somewhere")


def test_refused_pickles_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    with pytest.raises(DataError, match=r"asks for '(posix|nt) system'"):
        unpickle(HOSTILE["os.system"], "somewhere")


def same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("protocol", [3, 4])
def test_reads_what_pickle_writes(protocol: int) -> None:
    assert same(unpickle(pickle.dumps(BATCH, protocol), "batch"), BATCH)


@pytest.mark.parametrize("code", ["u1", "<u2", ">i4", "<i8", "<f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_reads_arrays_of_plain_numbers(code: str, order: str) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=code, order=order)
    assert same(unpickle(pickle.dumps(array, protocol=4), "batch"), array)


def test_reads_an_array_written_by_python_2() -> None:
    array = unpickle(python2_array((2, 3)), "batch")
    assert same(array, np.frombuffer(b"abcdef", dtype=np.uint8).reshape(2, 3))


def test_reads_many_arrays_of_one_dtype() -> None:
    arrays = [np.zeros(3, np.uint8), np.ones((2, 2), np.uint8)]
    assert all(map(same, unpickle(pickle.dumps(arrays, protocol=4), "batch"), arrays))


def test_depth_is_no_trouble() -> None:
    nested = unpickle(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "batch")
    assert len(nested) == 1


def test_shared_values_are_walked_once() -> None:
    doubled = b"\x80\x02]q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) if i else b"h\x00\x86q\x01" for i in range(60))
    assert unpickle(doubled + b".", "batch") is not None


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(PICKLE) - 1))
def test_truncated_anywhere(length: int) -> None:
    with pytest.raises(DataError):
        unpickle(PICKLE[:length], "batch")


def answers(data: bytes) -> None:
    """Reads `data` or refuses it; any other exception is a failure."""
    with suppress(DataError):
        unpickle(data, "batch")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([PICKLE, python2_array((2, 3))]),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_damage_is_answered(pickled: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(pickled)
    for place, byte in changes:
        damaged[place % len(damaged)] = byte
    answers(bytes(damaged))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([bytes([byte]) for byte in b"}]()(tuaes\x85\x86\x87\x93\x94R0b2Nq\x01h\x01K\x03NJU\x88"]),
        max_size=30,
    )
)
def test_any_program_is_answered(instructions: list[bytes]) -> None:
    answers(b"\x80\x02" + b"".join(instructions) + b".")
