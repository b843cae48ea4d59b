"""What a ranking of schedules holds. `print` and notebooks show it as a table."""

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

    Attributes:
      schedule: its name, as in `SCHEDULES`.
      num_microbatches: of one training step.
      remat: name of what is recomputed, `"none"` for nothing.
      time: of one training step, in the unit of the costs.
      bubble_ratio: the mean over the ranks of waiting over the pipeline's makespan.
      bubble: the mean over the ranks of the time that they wait.
      memory: what a device keeps at the peak.
      limit: bytes that it may keep.
      costs: of this schedule's stages on microbatches of this size.
      program: what runs, with its slots.
      reason: in words, why it is where it is in the ranking.
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
        """Bytes left under the limit; negative where it does not fit."""
        return self.limit - self.memory.total

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, with the numbers of slots in place of the program."""
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
            "num_weight_slots": self.program.num_weight_slots,
            "num_message_slots": self.program.num_message_slots,
        }


@dataclasses.dataclass(frozen=True, repr=False)
class Ranking:
    """Schedules from the best to the worst. `print` shows a table, and why.

    Attributes:
      candidates: those that fit, fastest first; then those that do not, the one that
        lacks least first.
      left_out: (schedule, number of microbatches, why) of what is no legal schedule.
      limit: bytes that a device may keep.
      notes: what the ranking takes for granted, where it matters.
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
        """The fastest that fits; None if nothing does, and then `reason` says so."""
        return self.fitting[0] if self.fitting else None

    @functools.cached_property
    def reason(self) -> str:
        """Why the best is the best and every other schedule is not; lines of text."""
        reasons = lookup.find("dualpipe_jax.planning.ranking_text:reasons")
        return "\n".join(reasons(self))

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
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
