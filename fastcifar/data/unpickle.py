"""Reads CIFAR's pickled batches without trusting them.

A pickle is a program, which the standard unpickler runs. It gets stand-ins for the three names of numpy that describe
an array, and nothing else to call. Numpy itself is not let near a pickle: it takes the flags of a dtype from one, and
with them bytes for pointers. Two more things would end the process rather than the reading, so they are refused
beforehand: a memo as large as the pickle says, and tuples so deep that hashing them overflows the C stack. So are
pickles with so many instructions that their values fill the memory.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from fastcifar.checks import given
from fastcifar.errors import DataError, reason

INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST "
    "APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL "
    "REDUCE BUILD".split()
)
"""The pickle opcodes of CIFAR's batches, and of those that Python 3 writes in protocols 2 to 4."""
MOST_INSTRUCTIONS = 500_000
"""Twice as many as the largest batch has; each may take some hundred bytes of memory."""
MOST_TUPLES = 1000
MOST_DIMENSIONS = 8
PLAIN_DTYPES = frozenset({"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"})


class Dtype:
    """Stand-in for `numpy.dtype`."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def plain(self) -> np.dtype:
        order, code = (text if isinstance(text, str) else text.decode("latin-1") for text in (self.order, self.code))
        if code not in PLAIN_DTYPES or order not in ("|", "<", ">"):
            raise ValueError("it has an array whose dtype is not a plain number")
        return np.dtype(order + code)


class Array:
    """Stand-in for the result of numpy's `_reconstruct`."""

    array: np.ndarray | None = None

    def __init__(self, *_: object) -> None:
        """Ignores the arguments, which only say that the array is empty so far."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        dtype = dtype.plain()
        if len(shape) > MOST_DIMENSIONS or any(type(side) is not int or side <= 0 for side in shape):
            raise ValueError(f"it has an array of shape {shape}")
        if math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"it has an array of shape {shape} and dtype {dtype}, but {len(content)} bytes for it")
        self.array = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,
    ("numpy", "ndarray"): None,  # an argument of `_reconstruct`
    ("numpy", "dtype"): Dtype,
}


class BatchUnpickler(pickle.Unpickler):
    """An unpickler that finds the stand-ins only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise ValueError(f"it asks for {f'{module} {name}'[:80]!r}, and only numpy arrays may be built")
        return STAND_INS[module, name]


def unpickle(data: bytes, name: str) -> dict:
    """Reads the dict that the pickle `data` describes.

    Its arrays are read-only views of `data`; strings that Python 2 wrote are bytes.

    Args:
        data: a pickle of protocol 2 to 4, as CIFAR publishes them.

    Raises:
        DataError: the pickle is truncated, malformed, or asks for anything but plain values and arrays of numbers.
    """
    try:
        check_instructions(data)
        batch = BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        if type(batch) is not dict:
            raise ValueError("it holds no dict")
    except Exception as error:  # on hostile bytes, the unpickler and the stand-ins raise nearly anything
        raise DataError(f"{name} is not a sound CIFAR batch: {reason(error)}; fetch the data set again.") from None
    return {key: value.array if isinstance(value, Array) else value for key, value in batch.items()}


def check_instructions(data: bytes) -> None:
    """Raises ValueError where the pickle has an opcode, or a number of them, that no batch needs."""
    tuples = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == MOST_INSTRUCTIONS:
            raise ValueError(f"it has more than {MOST_INSTRUCTIONS:,} instructions, and no CIFAR batch has so many")
        if opcode.name not in INSTRUCTIONS:
            raise ValueError(f"it holds the instruction {opcode.name}, which no CIFAR batch needs")
        if opcode.name == "LONG_BINPUT" and given(argument) > len(data):
            raise ValueError("it has a memo larger than itself")
        tuples += opcode.name.startswith("TUPLE")
    if tuples > MOST_TUPLES:
        raise ValueError(f"it has {tuples} tuples, and no CIFAR batch has {MOST_TUPLES}")
