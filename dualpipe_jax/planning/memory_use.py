"""What a rank keeps in memory when it runs a lowered schedule."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from dualpipe_jax.lowering import Program


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Bytes on one device of one of P stages, a P-th of the model.

    Attributes:
      residuals: of one microbatch: what F keeps until its W.
      wgrad_residuals: of one microbatch: what I keeps for its W beside `residuals`.
      parameters: of one stage, as its computation uses them.
      gradients: of one stage: the accumulators, float32 by default.
      at_rest: of one stage's parameters between steps, where those are other arrays
        than `parameters`: sharded over data-parallel devices, or of another dtype. None
        where the step takes `parameters` as they are.
      optimizer: of one stage's optimizer state.
      message: of one microbatch's activation between two stages.
      workspace: what the most demanding task needs in addition: weight gradients before
        they are accumulated, recomputed values, products. It grows with larger
        microbatches and is assumed not to shrink with smaller ones.
      pair_workspace: the same for an overlapped pair; `workspace` unless given.
      other: of what does not depend on the schedule: embedding, head, the runtime.

    Raises:
      ValueError: a number is negative or not finite.

    Examples:
      >>> StageMemory(residuals=6, wgrad_residuals=2, parameters=1, gradients=2).message
      0.0
    """

    residuals: float
    wgrad_residuals: float
    parameters: float
    gradients: float
    at_rest: float | None = None
    optimizer: float = 0.0
    message: float = 0.0
    workspace: float = 0.0
    pair_workspace: float | None = None
    other: float = 0.0

    def __post_init__(self):
        _check_fields(self, "give bytes.")


@dataclasses.dataclass(frozen=True)
class Remat:
    """A way to keep less from F to the backward, which recomputes the rest.

    Bytes and costs are of one microbatch on one of P stages, as in `StageMemory`.

    Attributes:
      name: what the ranking calls it, such as `"full"` or `"experts"`.
      residuals: bytes that F keeps until W.
      wgrad_residuals: bytes that I keeps for W beside `residuals`. Often more than
        without remat: W also needs what I has recomputed.
      cost: what recomputation adds to a B or I; by default F, the whole forward.
      overlapped_cost: what it adds to an overlapped pair; `cost` unless given.
      workspace: bytes, as in `StageMemory`, also for a pair. By default the workspace
        without remat, or the recomputed bytes if there are more of them.

    Raises:
      ValueError: a number is negative or not finite, or the name is empty or `"none"`.

    Examples:
      >>> Remat("full", residuals=1, wgrad_residuals=3).cost is None  # all of F
      True
    """

    name: str
    residuals: float
    wgrad_residuals: float
    cost: float | None = None
    overlapped_cost: float | None = None
    workspace: float | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or self.name in ("", "none"):
            raise ValueError(
                f"name={self.name!r} must be a word other than 'none', which means "
                "keeping everything; use 'full', for example."
            )
        _check_fields(self, "give bytes, or a cost in the unit of costs.")


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes that one device holds at the peak of a step, by purpose.

    Attributes:
      parameters: at rest, and the copies that the step makes of them.
      gradients: accumulators of every stage that the rank runs.
      optimizer: state of the rank's own stage.
      residuals: activation slots.
      wgrad_residuals: slots for what I keeps for its W.
      messages: slots of activations and cotangents on their way.
      workspace: what the most demanding step needs in addition.
      other: what does not depend on the schedule.

    Examples:
      >>> MemoryUse(4, 2, 1, 10, 3, 1, 2, 0).total
      23.0
    """

    parameters: float
    gradients: float
    optimizer: float
    residuals: float
    wgrad_residuals: float
    messages: float
    workspace: float
    other: float

    @property
    def total(self) -> float:
        return math.fsum(vars(self).values())


def memory_of(
    program: Program, memory: StageMemory, remat: Remat | None, microbatch: float
) -> MemoryUse:
    """Returns what a device holds at the peak, which is the same on every rank.

    Args:
      program: has the slots, and the stages that a rank runs.
      memory: of one of P stages.
      remat: what is recomputed, or None.
      microbatch: size of a microbatch relative to the measured one.
    """
    stage = program.schedule.num_ranks / program.schedule.num_stages
    held = stage * len(program.chunks[0])
    copied = 0.0 if _runs_in_place(program, memory) else held
    own = memory.parameters if memory.at_rest is None else memory.at_rest
    workspace = memory.workspace
    kept: StageMemory | Remat = memory
    if memory.pair_workspace is not None and any(len(k) == 2 for k in program.kinds):
        workspace = memory.pair_workspace
    if remat is not None:
        # Recomputed values die as weight gradients appear: the larger, not the sum.
        again = stage * (memory.residuals - remat.residuals)
        workspace = max(workspace, again)
        workspace = workspace if remat.workspace is None else remat.workspace
        kept = remat
    slot = stage * microbatch
    return MemoryUse(
        parameters=own + copied * memory.parameters,
        gradients=held * memory.gradients,
        optimizer=memory.optimizer,
        residuals=program.num_slots * slot * kept.residuals,
        wgrad_residuals=program.num_wgrad_residual_slots * slot * kept.wgrad_residuals,
        # One more, written by ranks that receive nothing in a permute.
        messages=(program.num_message_slots + 1) * microbatch * memory.message,
        workspace=max(1.0, microbatch) * workspace,
        other=memory.other,
    )


def _runs_in_place(program: Program, memory: StageMemory) -> bool:
    """Returns whether parameters are used in place, not copied to their chunks."""
    at_home = all(own == (rank,) for rank, own in enumerate(program.chunks))
    return memory.at_rest is None and at_home


def stages_moved(program: Program) -> float:
    """Returns the most stages (of P) that a rank's step brings from other ranks."""
    schedule = program.schedule
    owned = schedule.num_stages // schedule.num_ranks
    moved = max(
        sum(stage // owned != rank for stage in own)
        for rank, own in enumerate(program.chunks)
    )
    return moved / owned


def check_number(name: str, value: Any, remedy: str, positive: bool = False) -> float:
    """Returns `value` as a float; raises a ValueError that ends in `remedy`."""
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and not number):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(f"{name}={value!r} must be a finite number {bound}; {remedy}")
    return number


def check_kind(name: str, value: Any, kind: type) -> None:
    """Checks that an argument is an instance of `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} must be a {kind.__name__}; make one.")


def _check_fields(owner: Any, remedy: str) -> None:
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if field.name == "name" or (value is None and "None" in str(field.type)):
            continue
        object.__setattr__(owner, field.name, check_number(field.name, value, remedy))
