"""Names the phases of a module's collectives; see `dualpipe_jax.pictures.phases`."""

from __future__ import annotations

import collections

from dualpipe_jax.gpu.overlap.hlo import Computation
from dualpipe_jax.gpu.overlap.instructions import Instruction
from dualpipe_jax.gpu.overlap.program import HloProgram
from dualpipe_jax.pictures import phase

_VIEWS = ("get-tuple-element", "copy", "bitcast", "reshape")


def phase_of(program: HloProgram, computation: str, start: str) -> str:
    """Returns the phase of a collective, from its name or its neighbours' names.

    XLA drops the names of collectives that it wraps in asynchronous calls: the phase is
    then the most frequent one of what makes the operands and what reads the result.
    """
    found, _ = program.collectives(computation)[start]
    own = phase(found.op.op_name)
    where = program.module[computation]
    if own is None and start in where.by_name and "all-to-all" in found.kind:
        own = _vote(where, where.by_name[start])
    return own or last_part(found.op.op_name) or found.kind


def _vote(where: Computation, op: Instruction) -> str | None:
    neighbours = [where.by_name.get(name) for name in op.operands]
    for done in where.users.get(op.name, []):
        neighbours += _readers(where, done)
    votes: collections.Counter[str] = collections.Counter()
    for made in neighbours:
        while made is not None and not phase(made.op_name) and made.opcode in _VIEWS:
            made = _behind(where, made)
        named = phase(made.op_name) if made is not None else None
        if named and named.startswith(("dispatch", "combine")):
            votes[named] += 1
    return votes.most_common(1)[0][0] if votes else None


def _behind(where: Computation, view: Instruction) -> Instruction | None:
    """Returns the operand of a view; of a tuple (a former barrier), the element."""
    made = where.by_name.get(view.operands[0])
    if made is not None and made.opcode == "tuple" and view.get("index"):
        return where.by_name.get(made.operands[int(view.get("index"))])
    return made


def _readers(where: Computation, made: Instruction) -> list[Instruction]:
    """Returns the readers of a value, also those behind the tuple of a barrier."""
    found = []
    for user in where.users.get(made.name, []):
        if user.opcode != "tuple":
            found.append(user)
            continue
        at = str(user.operands.index(made.name))
        for element in where.users.get(user.name, []):
            if element.get("index") == at:
                found += where.users.get(element.name, [])
    return found


def last_part(op_name: str) -> str:
    """Returns the operation's own name, the last part of its path."""
    return op_name.rpartition("/")[2]
