"""Finds the collectives among a computation's instructions."""

from __future__ import annotations

import dataclasses

from dualpipe_jax.gpu.overlap.hlo import Computation, Module
from dualpipe_jax.gpu.overlap.instructions import Instruction
from dualpipe_jax.gpu.overlap.links import KINDS


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective in a computation.

    Attributes:
      kind: one of `KINDS`.
      op: the instruction that has the operands and the groups.
      where: the computation of that instruction; of an asynchronous call, the one that
        it calls.
      asynchronous: whether other instructions may run before its done.
    """

    kind: str
    op: Instruction
    where: Computation
    asynchronous: bool


def find(op: Instruction, where: Computation, module: Module) -> Collective | None:
    """Returns the collective that an instruction starts or runs, else None."""
    if op.opcode == "async-start":
        for name in op.called("calls"):
            inner = module[name]
            for each in inner.instructions:
                if each.opcode in KINDS:
                    return Collective(each.opcode, each, inner, not _is_sync(op))
        return None
    kind = op.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if kind == "recv":
        host = op.get("is_host_transfer") == "true"
        return None if host else Collective(kind, op, where, True)
    # XLA marks a start with nothing before its done, and runs it on the compute stream.
    asynchronous = op.opcode.endswith("-start") and not _is_sync(op)
    return Collective(kind, op, where, asynchronous)


def started_by(op: Instruction) -> str | None:
    """Returns the name of the start (or update) that a done waits for, else None."""
    if op.opcode == "async-update" or op.opcode.endswith("-done"):
        return op.operands[0]
    return None


def _is_sync(op: Instruction) -> bool:
    config = op.backend_config.get("collective_backend_config", {})
    return bool(config.get("is_sync", False))
