"""Parses one line of HLO: name, shape, opcode, operands and attributes."""

from __future__ import annotations

import json
import re
from typing import Any

_COMMENT = re.compile(r"/\*.*?\*/")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}()\[\],]')
_CALLED = re.compile(r"%?([\w.$-]+)")
_OPERAND = re.compile(r"%([\w.$-]+)|([\w.$-]+)$")


class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: as text; see `shapes`.
      opcode: such as `fusion` or `all-gather-start`.
      is_root: whether its computation returns it.
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
            # A shape may precede the name.
            match = _OPERAND.search(part)
            if match:
                found.append(match[1] or match[2])
        return found

    @property
    def literal(self) -> str:
        """The text in the parentheses; of a constant, its value."""
        return self._operands.strip()

    @property
    def attributes(self) -> dict[str, str]:
        if self._cache is None:
            pairs = (part.partition("=") for part in split_commas(self._attributes))
            self._cache = {key: value for key, sign, value in pairs if sign}
        return self._cache

    def get(self, name: str, default: str = "") -> str:
        """Returns the text of an attribute."""
        # Most lines do not have it: look before parsing the attributes.
        if name + "=" not in self._attributes:
            return default
        return self.attributes.get(name, default)

    def dims(self, name: str) -> tuple[int, ...]:
        """Returns the integers of an attribute such as `lhs_contracting_dims={1,2}`."""
        return tuple(int(number) for number in re.findall(r"\d+", self.get(name)))

    def called(self, *names: str) -> list[str]:
        """Returns the computations that these attributes name."""
        return [
            found[1] for name in names for found in _CALLED.finditer(self.get(name, ""))
        ]

    @property
    def op_name(self) -> str:
        """Where in the program it comes from; empty if the metadata does not say."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self._attributes)
        return match[1] if match else ""

    @property
    def backend_config(self) -> dict[str, Any]:
        """The backend's JSON object; empty where there is none, or other text."""
        text = self.get("backend_config")
        try:
            value = json.loads(text) if text else {}
            value = json.loads(value) if isinstance(value, str) and value else value
        except json.JSONDecodeError:
            return {}
        return value if isinstance(value, dict) else {}


def read(line: str) -> Instruction | None:
    """Parses a line; returns None if it is not an instruction."""
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
    """Returns the position behind the parenthesis that closes that at `opening`."""
    depth, at = 0, opening
    while True:
        close = text.find(")", at)
        if close < 0:
            return len(text)
        depth += text.count("(", at, close) - 1
        at = close + 1
        if not depth:
            return at


def split_commas(text: str) -> list[str]:
    """Splits at commas outside of brackets and strings."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
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
