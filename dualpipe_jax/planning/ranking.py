"""The result of ranking schedules, which prints and displays as a table."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from dualpipe_jax.lowering import Program
from dualpipe_jax.planning.memory_use import MemoryUse
from dualpipe_jax.schedules import Costs
from eplb_jax import lookup


@dataclasses.dataclass(frozen=True)
class RankedSchedule:
    """One combination of schedule, number of microbatches and recomputation.

    Its costs and bytes follow from those that `rank_schedules` is given, which are of
    one microbatch on one of P stages:

    - A schedule with 2P stages (DualPipeV) has stages half as large: half the costs,
      the residuals and the parameters; messages stay as they are.
    - A training step has the same tokens whatever M is: with twice as many microbatches
      each is half as large, and so are its costs, residuals and messages. The part
      `task_overhead` of every cost does not shrink, and neither does the workspace.
    - A schedule with overlapped pairs pays `costs.FB` for them, another one F and B.
    - Recomputation adds its cost to every B, I and pair.
    - Parameters at rest are held once. Accumulators are held for every stage that a
      rank runs, and so are copies of its parameters, unless it runs only its own stage:
      DualPipe runs two stages, DualPipeV two halves from other ranks.

    Attributes:
      schedule: its name, as in `SCHEDULES`.
      num_microbatches: of one training step.
      remat: name of the recomputation, or `"none"`.
      time: of one training step, in the unit of the costs.
      bubble_ratio: the mean waiting time of a rank over the pipeline's makespan.
      bubble: the mean waiting time of a rank.
      memory: what a device holds at the peak.
      limit: bytes that it may hold.
      costs: of this schedule's stages on microbatches of this size.
      program: the lowered schedule, with its slots.
      reason: a sentence on why it has its place in the ranking.
    """

    schedule: str
    num_microbatches: int
    remat: str
    time: float
    bubble_ratio: float
    bubble: float
    memory: MemoryUse
    limit: float
    costs: Costs
    program: Program = dataclasses.field(repr=False)
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    @property
    def spare(self) -> float:
        """Bytes left under the limit; negative if it does not fit."""
        return self.limit - self.memory.total

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with counts of slots in place of the program."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("program", "memory", "costs")
        }
        return {
            **plain,
            "fits": self.fits,
            "spare": self.spare,
            "memory": {**vars(self.memory), "total": self.memory.total},
            "costs": vars(self.costs),
            "num_slots": self.program.num_slots,
            "num_wgrad_residual_slots": self.program.num_wgrad_residual_slots,
            "num_message_slots": self.program.num_message_slots,
        }


@dataclasses.dataclass(frozen=True, repr=False)
class Ranking:
    """Schedules from best to worst; `print` shows them as a table, with reasons.

    Attributes:
      candidates: those that fit, fastest first; then those that do not, closest to
        fitting first.
      left_out: (schedule, number of microbatches, reason) of combinations for which no
        legal schedule exists.
      limit: bytes that a device may hold.
      notes: assumptions that may decide the ranking.
    """

    candidates: tuple[RankedSchedule, ...]
    left_out: tuple[tuple[str, int, str], ...]
    limit: float
    notes: tuple[str, ...] = ()

    @property
    def fitting(self) -> tuple[RankedSchedule, ...]:
        return tuple(each for each in self.candidates if each.fits)

    @property
    def best(self) -> RankedSchedule | None:
        """The fastest that fits; None if none does, which `reason` then explains."""
        return self.fitting[0] if self.fitting else None

    @functools.cached_property
    def reason(self) -> str:
        """Why the best is the best, and every other schedule is not; lines of text."""
        reasons = lookup.find("dualpipe_jax.planning.ranking_text:reasons")
        return "\n".join(reasons(self))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        best = self.best
        names = ("schedule", "num_microbatches", "remat")
        return {
            "limit": self.limit,
            "best": None if best is None else {n: getattr(best, n) for n in names},
            "reason": self.reason,
            "candidates": [each.to_dict() for each in self.candidates],
            "notes": list(self.notes),
            "left_out": [
                dict(zip((*names[:2], "reason"), each, strict=True))
                for each in self.left_out
            ],
        }

    def __repr__(self) -> str:
        title = lookup.find("dualpipe_jax.planning.ranking_text:title")
        best = "none" if self.best is None else title(self.best)
        return (
            f"Ranking({len(self.candidates)} candidates, {len(self.fitting)} fit; "
            f"best: {best})"
        )

    __str__ = lookup.method("dualpipe_jax.planning.ranking_text:text")
    _repr_html_ = lookup.method("dualpipe_jax.planning.ranking_text:html")
