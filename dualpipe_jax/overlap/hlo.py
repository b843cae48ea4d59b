"""Reads the text of HLO modules: computations, instructions, shapes, attributes.

A module of a large model has hundreds of thousands of lines, so that a line is only
taken apart when its computation is asked for, and attributes when they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")
_ATTRIBUTE_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}()\[\],]')
_NAME = re.compile(r"%?([\w.$-]+)")
_OPERAND = re.compile(r"%([\w.$-]+)|([\w.$-]+)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of one array: element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Of one element; 0 where nothing is stored (token, opaque)."""
        if self.dtype == "pred":
            return 8
        match = _BITS.match(self.dtype)
        return int(match[1]) if match else 0

    @property
    def num_bytes(self) -> int:
        return -(-self.size * self.bits // 8)


@functools.lru_cache(maxsize=65536)
def leaves(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape; those of a tuple, however nested, from left to right.

    Examples:
      >>> leaves("(bf16[2,3]{1,0}, (s32[], pred[4]{0}))")[0]
      Array(dtype='bf16', dims=(2, 3))
    """
    return tuple(
        Array(dtype, tuple(int(d.lstrip("<= ")) for d in dims.split(",") if d.strip()))
        for dtype, dims in _ARRAY.findall(_COMMENT.sub("", shape))
    )


def num_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape."""
    return sum(array.num_bytes for array in leaves(shape))


def split_commas(text: str) -> list[str]:
    """Splits at commas outside of brackets and strings."""
    parts, depth, start = [], 0, 0
    for token in _ATTRIBUTE_TOKEN.finditer(text):
        sign = token[0]
        if sign in "{([":
            depth += 1
        elif sign in "})]":
            depth -= 1
        elif sign == "," and not depth:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part]


class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: as text; see `leaves`.
      opcode: such as `fusion` or `all-gather-start`.
      is_root: whether it is what its computation returns.
    """

    __slots__ = (
        "_attributes",
        "_cache",
        "_operands",
        "is_root",
        "name",
        "opcode",
        "shape",
    )

    def __init__(self, name, shape, opcode, operands, attributes, is_root):
        self.name, self.shape, self.opcode = name, shape, opcode
        self._operands, self._attributes, self.is_root = operands, attributes, is_root
        self._cache: dict[str, str] | None = None

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        if self.opcode in ("parameter", "constant", "iota"):
            return []
        if "[" not in self._operands:
            return [part.strip(" %") for part in self._operands.split(",") if part]
        found = []
        for part in split_commas(self._operands):
            # With or without its shape before it.
            match = _OPERAND.search(part)
            if match:
                found.append(match[1] or match[2])
        return found

    @property
    def literal(self) -> str:
        """What stands in the parentheses: of a constant its value."""
        return self._operands.strip()

    @property
    def attributes(self) -> dict[str, str]:
        if self._cache is None:
            pairs = (part.partition("=") for part in split_commas(self._attributes))
            self._cache = {key: value for key, sign, value in pairs if sign}
        return self._cache

    def get(self, name: str, default: str = "") -> str:
        """The text of an attribute."""
        # Most lines do not have it: look before taking the line apart.
        if name + "=" not in self._attributes:
            return default
        return self.attributes.get(name, default)

    def dims(self, name: str) -> tuple[int, ...]:
        """An attribute such as `lhs_contracting_dims={1,2}`."""
        return tuple(int(number) for number in re.findall(r"\d+", self.get(name)))

    def called(self, *names: str) -> list[str]:
        """The computations that these attributes name."""
        return [
            found[1] for name in names for found in _NAME.finditer(self.get(name, ""))
        ]

    @property
    def op_name(self) -> str:
        """Where in the program it comes from; empty if metadata does not say."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self._attributes)
        return match[1] if match else ""

    @property
    def backend_config(self) -> dict[str, Any]:
        """The backend's JSON; empty where there is none, or something else."""
        text = self.get("backend_config")
        try:
            value = json.loads(text) if text else {}
            value = json.loads(value) if isinstance(value, str) and value else value
        except json.JSONDecodeError:
            return {}
        return value if isinstance(value, dict) else {}


class Computation:
    """A named list of instructions, in the order in which a scheduled module runs them.

    Attributes:
      name: without the percent sign.
    """

    def __init__(self, name: str, lines: list[str]):
        self.name, self._lines = name, lines

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        found = (_instruction(line) for line in self._lines)
        return [instruction for instruction in found if instruction is not None]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @property
    def root(self) -> Instruction:
        for each in reversed(self.instructions):
            if each.is_root:
                return each
        return self.instructions[-1]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {
            int(each.literal): each
            for each in self.instructions
            if each.opcode == "parameter"
        }

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instruction name -> the instructions that take it as an operand."""
        found: dict[str, list[Instruction]] = {}
        for each in self.instructions:
            for operand in dict.fromkeys(each.operands):
                found.setdefault(operand, []).append(each)
        return found

    def operand_shapes(self, instruction: Instruction) -> list[str]:
        return [
            self.by_name[name].shape if name in self.by_name else ""
            for name in instruction.operands
        ]

    def source(self, name: str) -> Instruction | None:
        """The instruction that makes a value, behind copies and bitcasts."""
        found = self.by_name.get(name)
        while found is not None and found.opcode in ("copy", "bitcast", "reshape"):
            found = self.by_name.get(found.operands[0])
        return found


class Module:
    """A module: its computations by name, its entry, and what its first line says.

    Attributes:
      name: of the module.
      computations: by name.
      entry: the computation that runs.
      num_devices: partitions times replicas.
    """

    def __init__(self, name, computations, entry, num_devices):
        self.name: str = name
        self.computations: dict[str, Computation] = computations
        self.entry: Computation = entry
        self.num_devices: int = num_devices

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def parse(text: str) -> Module:
    """Reads a scheduled module.

    Raises:
      ValueError: the text is no HLO module, or is not scheduled.
    """
    start = re.search(r"^HloModule ([^\s,]+)(.*)$", text, re.M)
    if start is None:
        shown = text.strip()[:40]
        raise ValueError(
            f"the text is not an HLO module (it begins with {shown!r}, and no line "
            "begins with 'HloModule'); pass `lowered.compile().as_text()`."
        )
    if "is_scheduled=true" not in start[2]:
        raise ValueError(
            f"the module {start[1]} is not scheduled (no is_scheduled=true in its "
            "first line), so that nothing can be said of overlap; pass the text of a "
            "compiled program, `lowered.compile().as_text()`, not of a lowered one."
        )
    computations: dict[str, Computation] = {}
    entry = None
    for name, is_entry, lines in _computations(text[start.end() :]):
        computations[name] = Computation(name, lines)
        if is_entry:
            entry = computations[name]
    if entry is None:
        raise ValueError(
            f"the module {start[1]} has no ENTRY computation; the text is cut off: "
            "pass all of `compiled.as_text()`."
        )
    count = 1
    for key in ("num_partitions", "replica_count"):
        found = re.search(rf"\b{key}=(\d+)", start[2])
        count *= int(found[1]) if found else 1
    return Module(start[1], computations, entry, count)


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    name, is_entry, lines = None, False, []
    for line in text.splitlines():
        if name is None:
            # A head stands at the line's begin: `ENTRY %name (params) -> shape {`.
            if line.endswith("{") and not line.startswith((" ", "\t")):
                is_entry = line.startswith("ENTRY ")
                match = _NAME.match(line.removeprefix("ENTRY ").lstrip())
                name = match[1] if match else None
                lines = []
        elif line.startswith("}"):
            yield name, is_entry, lines
            name = None
        else:
            lines.append(line)


def _instruction(line: str) -> Instruction | None:
    line = line.strip()
    is_root = line.startswith("ROOT ")
    left, sign, rest = line.removeprefix("ROOT ").partition(" = ")
    if not sign:
        return None
    if "/*" in rest:
        rest = _COMMENT.sub("", rest)
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if end <= 0 or opening < 0:
        return None
    closing = _closing(rest, opening)
    return Instruction(
        left.strip().lstrip("%"),
        shape,
        rest[:opening].strip(),
        rest[opening + 1 : closing - 1],
        rest[closing:].lstrip(", "),
        is_root,
    )


def _closing(text: str, opening: int) -> int:
    """The position behind the parenthesis that closes the one at `opening`."""
    depth, at = 0, opening
    while True:
        close = text.find(")", at)
        if close < 0:
            return len(text)
        depth += text.count("(", at, close) - 1
        at = close + 1
        if not depth:
            return at
