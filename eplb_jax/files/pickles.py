"""Reads pickles of plain data, without unpickling.

Unpickling runs whatever functions a file names. This machine knows how NumPy and torch
write an array, runs nothing else, and refuses every other name.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

# A file of many small objects takes fifty times its size in memory.
MAX_OPERATIONS = 2**23
_MARK = object()


class _Name(str):
    """A name that a pickle refers to, such as `numpy.ndarray`."""


class _DType:
    """A dtype before its byte order is known, and after."""

    def __init__(self, code: Any):
        if not (isinstance(code, str) and code[:1] in "biufO" and len(code) <= 3):
            raise ValueError(f"it holds an array of {str(code)[:40]!r}, no numbers.")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        if len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array, which has a value once its content is known."""

    value: Any

    def build(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        if not kind.dtype.hasobject:
            array = np.frombuffer(content, kind.dtype)
            self.value = array.reshape(shape, order="F" if is_fortran else "C")
        elif shape == ():  # numpy.save of an object that is not an array
            [self.value] = content
        else:
            raise ValueError("it holds an array of Python objects.")


def read_pickle(
    data: bytes, read_storage: Callable[[str, np.dtype], np.ndarray] | None = None
) -> Any:
    """Returns the plain data of a pickle.

    Args:
      data: the pickle.
      read_storage: returns the numbers of a torch tensor's storage by its key, [n].

    Returns:
      Numbers, strings, bytes, arrays, and tuples, lists and dicts of them.

    Raises:
      ValueError: it is damaged, or holds anything else.

    Examples:
      >>> import pickle
      >>> read_pickle(pickle.dumps({"counts": np.arange(3), "step": 7}))
      {'counts': array([0, 1, 2]), 'step': 7}
      >>> read_pickle(pickle.dumps(print))
      Traceback (most recent call last):
        ...
      ValueError: it holds builtins.print, which is no array, number, string, ...
    """
    machine = _Machine(read_storage)
    try:
        for count, (code, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_OPERATIONS:
                raise ValueError(
                    f"it holds more than {MAX_OPERATIONS} objects; save an array."
                )
            if code.name == "STOP":
                return machine.result()
            machine.run(code.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is a damaged pickle ({type(error).__name__}).") from error
    raise ValueError("it is a damaged pickle, without an end.")


class _Machine:
    """The stack that a pickle's operations work on, and what they remember."""

    def __init__(self, read_storage: Callable[[str, np.dtype], np.ndarray] | None):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.read_storage = read_storage

    def result(self) -> Any:
        [value] = self._pop(len(self.stack))
        if isinstance(value, _Name | _DType):
            raise ValueError(_refusal(value))
        return value

    def run(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(_VALUES[name](argument))
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[name])))
        else:
            operation = getattr(self, f"_do_{name.lower()}", None)
            if operation is None:
                raise ValueError(f"it uses {name}, which plain data does not need.")
            operation(argument)

    def _pop(self, number: int) -> list[Any]:
        if number > len(self.stack):
            raise IndexError
        items = self.stack[len(self.stack) - number :]
        del self.stack[len(self.stack) - number :]
        return _values(items)

    def _pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return _values(items)

    def _do_proto(self, argument: Any) -> None:
        pass

    _do_frame = _do_proto

    def _do_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _do_pop(self, _: Any) -> None:
        self.stack.pop()

    def _do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _do_list(self, _: Any) -> None:
        self.stack.append(self._pop_to_mark())

    def _do_dict(self, _: Any) -> None:
        self.stack.append(_pairs(self._pop_to_mark()))

    def _do_append(self, _: Any) -> None:
        self._extend(self._pop(1))

    def _do_appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(items)

    def _do_setitem(self, _: Any) -> None:
        self._update(self._pop(2))

    def _do_setitems(self, _: Any) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise TypeError
        self.stack[-1].update(_pairs(items))

    def _do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _do_put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    _do_binput = _do_long_binput = _do_put

    def _do_get(self, number: int) -> None:
        self.stack.append(self.memo[number])

    _do_binget = _do_long_binget = _do_get

    # What NumPy and torch name.

    def _do_global(self, both: str) -> None:
        self.stack.append(_known(".".join(both.split(" ", 1))))

    def _do_stack_global(self, _: Any) -> None:
        module, name = self._pop(2)
        self.stack.append(_known(f"{module}.{name}"))

    def _do_reduce(self, _: Any) -> None:
        name, arguments = self._pop(2)
        if not isinstance(name, _Name) or name not in _MAKERS:
            raise ValueError(_refusal(name))
        self.stack.append(_MAKERS[name](*arguments))

    def _do_build(self, _: Any) -> None:
        [state] = self._pop(1)
        target = self.stack[-1]
        if isinstance(target, _Array | _DType):
            target.build(state)
        elif type(target) is not dict:  # an OrderedDict's attributes do not matter
            raise ValueError(_refusal(target))

    def _do_binpersid(self, _: Any) -> None:
        [(kind, storage, key, *_)] = self._pop(1)
        if self.read_storage is None or kind != "storage":
            raise ValueError("it refers to another file.")
        if storage not in _STORAGES:
            raise ValueError(f"it holds {storage}, whose numbers are not supported.")
        self.stack.append(self.read_storage(str(key), _STORAGES[storage]))


def _values(items: list[Any]) -> list[Any]:
    if any(item is _MARK for item in items):
        raise IndexError
    return [item.value if isinstance(item, _Array) else item for item in items]


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _known(name: str) -> _Name:
    if name not in _MAKERS and name not in _STORAGES and name != "numpy.ndarray":
        raise ValueError(_refusal(name))
    return _Name(name)


def _refusal(what: Any) -> str:
    name = str(what)[:80] if isinstance(what, str) else f"a bare {type(what).__name__}"
    return (
        f"it holds {name}, which is no array, number, string, list or dict; nothing of "
        "it was run."
    )


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"it holds bytes as {str(encoding)[:40]!r}.")
    return text.encode("latin1")


def _scalar(kind: _DType, content: bytes) -> Any:
    return np.frombuffer(content, kind.dtype, 1)[0]


def _from_buffer(content: bytes, kind: _DType, shape: tuple, order: str) -> np.ndarray:
    array = np.frombuffer(content, kind.dtype)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _tensor(
    storage: np.ndarray, start: int, shape: tuple, strides: tuple, *_: Any
) -> np.ndarray:
    """Returns a copy of a torch tensor, whose strides count numbers."""
    sizes = (start, *shape, *strides)
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"it holds a tensor of shape {shape} and strides {strides}.")
    if len(shape) != len(strides):
        raise ValueError(f"it holds a tensor of shape {shape} and strides {strides}.")
    last = start + sum(max(n - 1, 0) * by for n, by in zip(shape, strides, strict=True))
    number = math.prod(shape)
    if number and (last >= len(storage) or number > len(storage)):
        raise ValueError(
            f"it holds a tensor of shape {shape}, but only {len(storage)} numbers."
        )
    if not number:
        return np.zeros(shape, storage.dtype)
    steps = [by * storage.itemsize for by in strides]
    view = np.lib.stride_tricks.as_strided(storage[start:], shape, steps)
    return np.array(view, order="C")


_VALUES: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
} | {
    name: lambda argument: argument
    for name in (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
        *("FLOAT", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    )
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAKERS: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": lambda code, *_: _DType(code),
    "_codecs.encode": _encoded,
    "collections.OrderedDict": lambda: {},
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _tensor,
}
_STORAGES = {
    f"torch.{name}Storage": np.dtype(code)
    for name, code in {
        "Byte": "u1",
        "Char": "i1",
        "Short": "i2",
        "Int": "i4",
        "Long": "i8",
        "Half": "f2",
        "Float": "f4",
        "Double": "f8",
    }.items()
}
