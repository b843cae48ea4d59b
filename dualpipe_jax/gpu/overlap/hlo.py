"""Reads the text of scheduled HLO modules: their computations and instructions.

A large model's module has hundreds of thousands of lines, so lines are parsed when
their computation is first read, and attributes when they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from dualpipe_jax.gpu.overlap import instructions
from dualpipe_jax.gpu.overlap.instructions import Instruction

_NAME = re.compile(r"%?([\w.$-]+)")


class Computation:
    """A named list of instructions, in the order in which a scheduled module runs them.

    Attributes:
      name: without the percent sign.
    """

    def __init__(self, name: str, lines: list[str]):
        self.name, self._lines = name, lines

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        found = (instructions.read(line) for line in self._lines)
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
        """Maps an instruction's name to the instructions that take it as an operand."""
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
        """Returns the instruction that makes a value, behind copies and bitcasts."""
        found = self.by_name.get(name)
        while found is not None and found.opcode in ("copy", "bitcast", "reshape"):
            found = self.by_name.get(found.operands[0])
        return found


class Module:
    """A module: its computations, its entry, and what its first line says.

    Attributes:
      name: of the module.
      computations: by name.
      entry: the computation that a run starts with.
      num_devices: partitions times replicas.
    """

    def __init__(self, name, computations, entry, num_devices):
        self.name: str = name
        self.computations: dict[str, Computation] = computations
        self.entry: Computation = entry
        self.num_devices: int = num_devices

    def __getitem__(self, name: str) -> Computation:
        if name not in self.computations:
            raise ValueError(
                f"the module {self.name} calls the computation {name!r}, which its "
                "text does not contain; pass all of `compiled.as_text()`."
            )
        return self.computations[name]


def parse(text: str) -> Module:
    """Reads a scheduled module.

    Raises:
      ValueError: the text is not an HLO module, or not a scheduled one.
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
            "first line), so its text does not show what overlaps; pass the text of a "
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
            f"the text of the module {start[1]} contains no ENTRY computation; pass "
            "all of `compiled.as_text()`."
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
            # A head is not indented: `ENTRY %name (params) -> shape {`.
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
