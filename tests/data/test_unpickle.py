from __future__ import annotations

import os
import pickle
import struct
from types import NoneType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.data.unpickle import Dtype, unpickle
from fastcifar.errors import DataError

BATCH = {
    b"data": np.arange(12, dtype=np.uint8).reshape(3, 4),
    b"labels": [0, 1, 2],
    b"name": "b",
    b"more": (None, True, 1.5, {}),
}
PICKLE = pickle.dumps(BATCH, protocol=4)


class Reduced:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def python2_array(
    shape: tuple[int, ...], code: bytes = b"u1", order: bytes = b"|", content: bytes = b"abcdef"
) -> bytes:
    """Pickles an array opcode by opcode as Python 2 and numpy 1 do, and as CIFAR's batches have it."""
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
    "numpy function": pickle.dumps(Reduced(np.zeros, (10**12,)), protocol=4),
    "instance of a class": pickle.dumps(Reduced(Reduced), protocol=2),
    "object dtype": pickle.dumps(np.array([object], dtype=object), protocol=4),
    "structured dtype": pickle.dumps(np.zeros(2, dtype=[("a", "u1")]), protocol=4),
    "date dtype": pickle.dumps(np.zeros(2, dtype="M8[s]"), protocol=4),
    "pointers for objects": python2_array((1,), code=b"O8", content=bytes(8)),
    "numpy name with a dot": b"\x80\x04\x8c\x05numpy\x8c\x14dtype.__subclasses__\x93.",
    "module and attribute of the wrong type": b"\x80\x04K\x01K\x02\x93.",
    "ndarray called": b"\x80\x02cnumpy\nndarray\nK\x05\x85\x85R.",
    "array of 2**40 bytes": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    b"\x8a\x06\0\0\0\0\0\1\x85U\x01b\x87R.",
    "state of a list": b"\x80\x02]}b.",
    "state of a function": b"\x80\x02cnumpy\ndtype\n}U\x08__code__Nsb.",
    "shape larger than the contents": python2_array((7,)),
    "negative shape": python2_array((-2, -3)),
    "huge shape": python2_array((2**31 - 1,) * 8),
    "too many dimensions": python2_array((1,) * 40 + (6,)),
    "unknown byte order": python2_array((6,), order=b"!"),
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\xff0.",
    "huge memo index as text": b"Np4294967295\n.",
    "memo index never put": b"\x80\x02h\x05.",
    "nested tuple as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "list as a key": b"\x80\x02}]Ns.",
    "unequal keys and values": b"\x80\x02}(U\x01aNU\x01bu.",
    "append to nothing": b"\x80\x02Na.",
    "no mark": b"\x80\x02K\x01t.",
    "no dict": b"\x80\x02].",
    "no value": b"\x80\x02.",
    "no stop": b"\x80\x02N",
    "nothing": b"",
    "persistent identifier": b"\x80\x02U\x01aQ.",
    "extension registry": b"\x80\x02\x82\x01.",
    "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "old instance": b"(inumpy\nndarray\n.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "huge string": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",
    "millions of lists": b"\x80\x02" + b"]" * 2_000_000 + b".",
    "text that is no utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "not a pickle": b"<!DOCTYPE html><html>",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_refuses_in_one_sentence(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    with pytest.raises(DataError, match=r"^somewhere is not a sound CIFAR batch: [^\n]*; fetch the data set again\.$"):
        unpickle(data, "somewhere")


def test_says_what_a_pickle_would_run() -> None:
    with pytest.raises(DataError, match=r"asks for '(posix|nt) system'"):
        unpickle(HOSTILE["os.system"], "somewhere")


def same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("protocol", [3, 4])
def test_reads_what_pickle_writes(protocol: int) -> None:
    read = unpickle(pickle.dumps(BATCH, protocol), "batch")
    assert read.keys() == BATCH.keys()
    assert all(same(read[key], BATCH[key]) for key in BATCH)


@pytest.mark.parametrize("code", ["u1", "<u2", ">i4", "<i8", "<f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_reads_arrays_of_plain_numbers(code: str, order: str) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=code, order=order)
    assert same(unpickle(pickle.dumps({"a": array, "b": array[:1]}, protocol=4), "batch")["a"], array)


def test_reads_what_python_2_wrote() -> None:
    batch = unpickle(b"\x80\x02}U\x04data" + python2_array((2, 3))[2:-1] + b"s.", "batch")
    assert same(batch[b"data"], np.frombuffer(b"abcdef", dtype=np.uint8).reshape(2, 3))


def test_neither_depth_nor_sharing_is_trouble() -> None:
    deep = b"]" * 50_000 + b"a" * 49_999
    doubled = b"]q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) if i else b"h\x00\x86q\x01" for i in range(60))
    for value in (deep, doubled):
        assert list(unpickle(b"\x80\x02}U\x01a" + value + b"s.", "batch")) == [b"a"]


def assert_read_or_refused(data: bytes) -> None:
    """Asserts that `data` is read as a dict of arrays and plain values, or refused; any other error passes through."""
    try:
        batch = unpickle(data, "batch")
    except DataError:
        return
    assert type(batch) is dict
    values = {type(value) for value in batch.values()}
    assert values <= {np.ndarray, list, tuple, dict, str, bytes, int, float, bool, NoneType, Dtype, type}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(PICKLE) - 1))
def test_truncated_anywhere(length: int) -> None:
    with pytest.raises(DataError):
        unpickle(PICKLE[:length], "batch")


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([PICKLE, python2_array((2, 3))]),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_damage_is_read_or_refused(pickled: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(pickled)
    for place, byte in changes:
        damaged[place % len(damaged)] = byte
    assert_read_or_refused(bytes(damaged))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *(bytes([byte]) for byte in b"}]()(tuaes\x85\x86\x87\x93\x94R0b2N\x88"),
                *(b"q\x01", b"h\x01", b"K\x03", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"),
            ]
        ),
        max_size=30,
    )
)
def test_any_program_is_read_or_refused(instructions: list[bytes]) -> None:
    assert_read_or_refused(b"\x80\x02" + b"".join(instructions) + b".")
