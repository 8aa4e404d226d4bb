"""Reads CIFAR's pickled batches without trusting them.

A pickle is a program, and the standard unpickler runs it: it calls what the pickle names, makes its memo as large as
the pickle says, and overflows the C stack when a deeply nested tuple becomes a dict key. So the few instructions that
CIFAR's batches use are interpreted here instead. What a batch asks of numpy is written down rather than called, and
turned into an array once it proves sound.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcifar.errors import DataError

NUMPY_NAMES = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
}
PLAIN_DTYPES = frozenset({"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"})
MOST_DIMENSIONS = 8

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTIES = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"})
STRINGS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"})
PYTHON2_STRINGS = frozenset({"BINSTRING", "SHORT_BINSTRING"})
SCALARS = frozenset({type(None), bool, int, float, str, bytes})


@dataclass(eq=False)
class _StandIn:
    """What the pickle asked numpy for, written down and never carried out."""

    name: str
    arguments: tuple | None = None
    state: object = None


class _Refused(Exception):
    """Why a pickle is not read."""


def unpickle(data: bytes, name: str) -> Any:
    """What the pickle `data` describes: numpy arrays, lists, tuples, dicts, bytes, strings, numbers, booleans and None.

    Strings written by Python 2 come back as bytes, as from ``pickle.loads(data, encoding="bytes")``. Arrays are
    read-only views of their bytes, of 1 to 8 dimensions and a plain integer or float dtype. Time and memory are linear
    in the length of `data`, whatever it contains.

    Args:
        data: a pickle of protocol 2 to 4, as CIFAR publishes them.
        name: the file it came from, for messages.

    Raises:
        DataError: the pickle is truncated, malformed, or asks for anything else.
    """
    try:
        return _Interpreter().run(data)
    except (_Refused, ValueError) as error:
        reason = str(error)
    except (IndexError, KeyError):
        reason = "its instructions do not fit together"
    raise DataError(f"{name} is not a sound CIFAR batch: {reason}; fetch the data set again.")


class _Interpreter:
    """The pickle machine, cut down to building plain values: a stack, the stacks below each open mark, and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in NUMBERS or name in STRINGS:
                self.stack.append(argument)
            elif name in PYTHON2_STRINGS:
                self.stack.append(argument.encode("latin-1"))
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in EMPTIES:
                self.stack.append(EMPTIES[name]())
            elif name in FIXED_TUPLES:
                self.stack.append(tuple(self.pop(FIXED_TUPLES[name])))
            elif name == "GLOBAL":
                self.stack.append(_find_global(argument))
            elif step := getattr(self, f"do_{name.lower()}", None):
                step()
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise _Refused(f"it holds the instruction {name}, which no CIFAR batch needs")
        if self.below or len(self.stack) != 1:
            raise _Refused("it does not end with one value")
        _check_plain(self.stack[0])
        return self.stack[0]

    def pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise IndexError
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def do_mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def do_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_tuple(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def do_append(self) -> None:
        self.extend_list(self.pop(1))

    def do_appends(self) -> None:
        self.extend_list(self.pop_mark())

    def do_setitem(self) -> None:
        self.extend_dict(self.pop(2))

    def do_setitems(self) -> None:
        self.extend_dict(self.pop_mark())

    def extend_list(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused("it appends to something that is not a list")
        self.stack[-1].extend(items)

    def extend_dict(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if type(self.stack[-1]) is not dict or len(keys) != len(values):
            raise _Refused("it sets items of something that is not a dict")
        if not {type(key) for key in keys} <= {str, bytes}:
            raise _Refused("it has a dict key that is not a string")
        self.stack[-1].update(zip(keys, values, strict=True))

    def do_stack_global(self) -> None:
        module, attribute = self.pop(2)
        self.stack.append(_find_global(f"{module} {attribute}" if type(module) is type(attribute) is str else ""))

    def do_reduce(self) -> None:
        function, arguments = self.pop(2)
        callable_here = isinstance(function, _StandIn) and function.arguments is None and function.name != "ndarray"
        if not callable_here or type(arguments) is not tuple:
            raise _Refused("it calls something other than numpy's array and dtype constructors")
        self.stack.append(_StandIn(function.name, arguments))

    def do_build(self) -> None:
        target, state = self.pop(2)
        if not isinstance(target, _StandIn) or target.arguments is None or target.state is not None:
            raise _Refused("it sets the state of something other than a new array or dtype")
        target.state = state
        self.stack.append(_array(target) if target.name == "reconstruct" else target)


def _find_global(name: str) -> _StandIn:
    """A stand-in for numpy's `name` ("module attribute"), if it is one of the four that describe an array."""
    if name not in NUMPY_NAMES:
        raise _Refused(f"it asks for {name[:80]!r}, and only numpy arrays may be built")
    return _StandIn(NUMPY_NAMES[name])


def _array(described: _StandIn) -> np.ndarray:
    """The array that a call of numpy's `_reconstruct` and its state describe, once they agree with each other."""
    match described.arguments:
        case _StandIn(name="ndarray", arguments=None), (0,), b"b":
            pass
        case _:
            raise _Refused("it makes an array of an unknown type")
    match described.state:
        case 1, tuple(shape), _StandIn() as element, bool() | 0 | 1 as fortran, bytes(content):
            dtype = _dtype(element)
        case _:
            raise _Refused("it describes an array in an unknown way")
    if not 1 <= len(shape) <= MOST_DIMENSIONS or any(type(n) is not int or not 0 < n <= len(content) for n in shape):
        raise _Refused("it has an array whose shape does not fit its contents")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise _Refused(f"it has an array of shape {shape} and dtype {dtype}, but {len(content)} bytes for it")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _dtype(described: _StandIn) -> np.dtype:
    """The plain dtype that a call of numpy's `dtype` and its state describe."""
    match described.name, described.arguments, described.state:
        case "dtype", (str() | bytes() as code, _, _), (3, str() | bytes() as order, None, None, None, -1, -1, 0):
            code, order = (text if isinstance(text, str) else text.decode("latin-1") for text in (code, order))
            if code in PLAIN_DTYPES and order in ("|", "<", ">"):
                return np.dtype(order + code)
    raise _Refused("it has an array whose dtype is not a plain number")


def _check_plain(root: object) -> None:
    """Refuses a stand-in left anywhere below `root`; each container is entered once, however often it is shared."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if type(item) in (list, tuple, dict):
            if id(item) not in seen:
                seen.add(id(item))
                waiting.extend(item.values() if type(item) is dict else item)
        elif type(item) not in SCALARS and type(item) is not np.ndarray:
            raise _Refused("it leaves an array or dtype unfinished")
