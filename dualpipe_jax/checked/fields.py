"""Checks the fields of a dataclass against their annotations, when it is made.

An annotation says all: types, and as `Annotated[float, Range(0)]` a range. Numbers must
be finite, and in their range as float32 too, which is what programs compute in.
Integers fit into 32 bits unless a range says otherwise, and a bool is no number.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import numbers
import struct
import types
import typing
from typing import Annotated, Any, Literal, NamedTuple, Union

INT32_MAX = 2**31 - 1


class Range(NamedTuple):
    """Which numbers a field may have.

    Attributes:
      low: the least.
      high: the largest.
      above: whether `low` itself is left out.
      below: whether `high` itself is left out.

    Examples:
      >>> half_open = Range(0, 1, below=True)
      >>> half_open.problem(-1), half_open.problem(0.5), half_open.problem(1)
      ('at least 0', '', 'below 1')
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str:
        """What a number must be, if it is not in the range; else an empty text."""
        if value < self.low or (self.above and value == self.low):
            return f"{'above' if self.above else 'at least'} {self.low}"
        if value > self.high or (self.below and value == self.high):
            return f"{'below' if self.below else 'at most'} {self.high}"
        return ""


Count = Annotated[int, Range(1, INT32_MAX)]
Size = Annotated[int, Range(0, INT32_MAX)]
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_FLOAT32 = Range(-_FLOAT32_MAX, _FLOAT32_MAX)
_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
}


def check_fields(config: Any) -> None:
    """Checks every field of a dataclass; call it in `__post_init__`.

    NumPy's numbers are replaced by Python's. A field may always have its default, such
    as a None that stands for what `__post_init__` computes from other fields.

    Args:
      config: an instance, frozen or not.

    Raises:
      ValueError: a field has another type than its annotation, or is not in its range.

    Examples:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     num_steps: Count
      ...     rate: float = 0.1
      ...     def __post_init__(self):
      ...         check_fields(self)
      >>> Config(0)
      Traceback (most recent call last):
      ValueError: num_steps=0 must be at least 1.
      >>> Config(3, rate="0.1")
      Traceback (most recent call last):
      ValueError: rate='0.1' must be a finite number.
      >>> Config(3, rate=1e40)
      Traceback (most recent call last):
      ValueError: rate=1e+40 must be at most 3.4028234663852886e+38 in float32.
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is field.default:
            continue
        if problem := _problem(value, hints[field.name]):
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            problem = problem if problem[0] == ":" else f" must be {problem}"
            raise ValueError(f"{field.name}={shown}{problem}.")
        if isinstance(value, numbers.Number) and hasattr(value, "item"):
            object.__setattr__(config, field.name, typing.cast(Any, value).item())


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _problem(value: Any, hint: Any) -> str:
    """What a value must be, if it is not; else an empty text.

    What begins with a colon is about an item of a container.
    """
    if hint is int:
        hint = Annotated[int, Range(-INT32_MAX, INT32_MAX)]
    if hint is float:
        hint = Annotated[float, Range()]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, *ranges = args
        if not _is_a(value, kind):
            return _name(kind)
        problems = [each.problem(value) for each in ranges]
        if kind is float and not any(problems):
            rounded = _as_float32(value)
            problems = [each.problem(rounded) for each in (*ranges, _FLOAT32)]
            problems = [each and f"{each} in float32" for each in problems]
        return next(filter(None, problems), "")
    if origin in (Union, types.UnionType):
        problems = [_problem(value, arg) for arg in args]
        # If its type is that of one of them, what is wrong is its range, or an item.
        close = [p for p in problems if p.startswith(("at ", "above", "below", ":"))]
        return "" if "" in problems else " or ".join(close or problems)
    if origin is Literal:
        is_one = any(type(arg) is type(value) and arg == value for arg in args)
        return "" if is_one else " or ".join(map(repr, args))
    if origin is collections.abc.Callable:
        return "" if callable(value) else "a function"
    if origin is not None:
        return _problem_of_items(value, origin, args)
    return "" if hint is Any or _is_a(value, hint) else _name(hint)


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        is_number = isinstance(value, number) and not isinstance(value, bool)
        return is_number and (kind is int or _is_finite(value))
    return isinstance(value, type(None) if kind is None else kind)


def _name(kind: Any) -> str:
    return _NAMES.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _as_float32(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _problem_of_items(value: Any, origin: Any, args: tuple[Any, ...]) -> str:
    """The problem of a container, or of what is in it."""
    if not isinstance(value, origin):
        return f"a {origin.__name__.lower()}"
    if issubclass(origin, collections.abc.Mapping):
        items = [
            each for pair in value.items() for each in zip(pair, args, strict=True)
        ]
    else:
        items = [(item, args[0]) for item in value]
    for item, hint in items:
        if problem := _problem(item, hint):
            return f": {item!r} must be {problem}"
    return ""
