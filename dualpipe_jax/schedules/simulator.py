"""Event-driven simulation: when each step would run, and where ranks would wait.

A step starts as soon as its rank is free and all of its inputs have arrived; nothing
else delays it. The waits that the permutes of a lowered program cause are modelled by
the lowering, which registers that case with `simulate`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

from dualpipe_jax.schedules.schedule import OPS, Schedule, Step
from eplb_jax import lookup

StepSpan = tuple[Step, float, float]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each kind of step costs, in any unit of time.

    Attributes:
      F: forward of one stage on one microbatch.
      I: backward for input only.
      W: backward for weights only.
      B: full backward; I + W unless given.
      FB: an overlapped pair of a forward and a full backward; F + B unless given.
      p2p: delay between the end of a step and the arrival of its result on another
        rank. It occupies neither rank.

    Raises:
      ValueError: a cost is negative or not a finite number.

    Examples:
      >>> Costs(F=97, I=104, W=35, FB=129).B
      139.0
    """

    F: float = 1.0
    I: float = 1.0
    W: float = 1.0
    B: float | None = None
    FB: float | None = None
    p2p: float = 0.0

    def __post_init__(self):
        for name in ("F", "I", "W", "B", "FB", "p2p"):
            value = getattr(self, name)
            if value is None and name == "B":
                value = self.I + self.W
            elif value is None and name == "FB":
                value = self.F + (self.B or 0.0)
            number = float(value) if isinstance(value, numbers.Real) else math.nan
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(
                    f"{name}={value!r} must be a finite number >= 0; give a duration."
                )
            object.__setattr__(self, name, number)

    def of(self, step: Step) -> float:
        """Cost of a step: of its one task, or of the overlapped pair."""
        return getattr(self, step[0].op if len(step) == 1 else "FB")


@dataclasses.dataclass(frozen=True, repr=False)
class Timeline:
    """When every step ran; a notebook displays a timeline as a picture.

    Attributes:
      schedule: what was simulated.
      spans: for each rank a tuple of (step, start, end), in the rank's order.
      costs: the costs of the simulation.

    Examples:
      >>> from dualpipe_jax.schedules.generators.dualpipe import dualpipe
      >>> timeline = simulate(dualpipe(8, 20))
      >>> timeline
      Timeline(dualpipe, 8 ranks, 20 microbatches: makespan 66, bubble 9.1 %)
      >>> timeline.busy[0], timeline.bubble[0], timeline.peak_activations[0]
      (60.0, 6.0, 9)
    """

    schedule: Schedule
    spans: tuple[tuple[StepSpan, ...], ...]
    costs: Costs

    @functools.cached_property
    def makespan(self) -> float:
        """Time until all ranks are done."""
        return max(end for rank in self.spans for _, _, end in rank)

    @functools.cached_property
    def busy(self) -> tuple[float, ...]:
        """For each rank, the time it spends in steps."""
        return tuple(
            math.fsum(end - start for _, start, end in rank) for rank in self.spans
        )

    @property
    def bubble(self) -> tuple[float, ...]:
        """For each rank, the time it waits: makespan minus busy."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_ratio(self) -> float:
        """Mean bubble of a rank over the makespan; 0 if the makespan is 0."""
        if not self.makespan:
            return 0.0
        return math.fsum(self.bubble) / (len(self.spans) * self.makespan)

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """For each rank, the most activations that are alive at once."""
        return tuple(
            peak_activations(step for step, _, _ in rank) for rank in self.spans
        )

    def __repr__(self) -> str:
        return (
            f"Timeline({self.schedule.kind}, {self.schedule.num_ranks} ranks, "
            f"{self.schedule.num_microbatches} microbatches: makespan "
            f"{self.makespan:.6g}, bubble {100 * self.bubble_ratio:.1f} %)"
        )

    _repr_html_ = lookup.method("dualpipe_jax.pictures.show:html_fragment")


def measure(
    schedule: Schedule, spans: Iterable[Iterable[StepSpan]], costs: Costs
) -> Timeline:
    """Makes a timeline of a simulation's spans, for each rank (step, start, end)."""
    return Timeline(schedule, tuple(map(tuple, spans)), costs)


def peak_activations(steps: Iterable[Step]) -> int:
    """Returns the most activations a rank holds at once, running `steps` in order.

    An activation lives from its F until its B or W; within an overlapped pair, those of
    the F and of the B both count. A rank that never runs a backward keeps none.

    Examples:
      >>> from dualpipe_jax.schedules.generators.gpipe import gpipe
      >>> peak_activations(gpipe(2, 7).steps[0])
      7
    """
    alive = peak = 0
    released = False
    for step in steps:
        alive += sum(task.op == "F" for task in step)
        peak = max(peak, alive)
        done = sum(task.op in "BW" for task in step)
        alive -= done
        released = released or done > 0
    return peak if released else 0


@functools.singledispatch
def simulate(schedule_or_program: Any, costs: Costs = Costs()) -> Timeline:
    """Simulates one training step.

    Args:
      schedule_or_program: a `Schedule`, which runs as under an event-driven
        dispatcher; or a lowered `Program`, which runs with the waits that its permutes
        cause. Pass it by position.
      costs: what the steps cost; unit costs by default.

    Returns:
      When every step ran, with makespan, bubbles and peak activations.

    Raises:
      TypeError: `schedule_or_program` is neither.

    Examples:
      >>> from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
      >>> simulate(one_f_one_b(4, 8)).bubble  # (P-1)(F+B) on every rank
      (9.0, 9.0, 9.0, 9.0)
    """
    raise TypeError(
        f"Cannot simulate {type(schedule_or_program).__name__}; pass a Schedule, or "
        "what lower(schedule) returns."
    )


@simulate.register
def _(schedule: Schedule, costs: Costs = Costs()) -> Timeline:
    starts, ends = simulate_steps(schedule, costs)
    spans = (
        zip(own, starts[first:], ends[first:], strict=False)
        for own, first in zip(schedule.steps, schedule.arrays.first, strict=False)
    )
    return measure(schedule, spans, costs)


def simulate_steps(schedule: Schedule, costs: Costs) -> tuple[list[float], list[float]]:
    """Returns when every step starts and ends, rank by rank in each rank's order."""
    arrays = schedule.arrays
    durations = np.array([getattr(costs, op) for op in (*OPS, "FB")])[arrays.kind]
    is_far = (arrays.awaited >= 0) & (arrays.rank[arrays.awaited] != arrays.rank)
    delays = np.where(is_far, costs.p2p, 0.0)
    # The last entry is the end of what a step need not wait for.
    starts, ends = [0.0] * len(durations), [0.0] * (len(durations) + 1)
    free = [0.0] * schedule.num_ranks
    # Ranks run in order and share nothing but results, so any order in which steps
    # follow those that they depend on gives the event-driven times.
    rank, position = np.array(schedule.dependency_order).T
    order = arrays.first[rank] + position
    columns = (order, rank, *arrays.awaited[:, order], *delays[:, order])
    columns = (column.tolist() for column in (*columns, durations[order]))
    for step, rank, one, two, one_delay, two_delay, duration in zip(
        *columns, strict=True
    ):
        start = max(free[rank], ends[one] + one_delay, ends[two] + two_delay)
        starts[step] = start
        free[rank] = ends[step] = start + duration
    return starts, ends[:-1]
