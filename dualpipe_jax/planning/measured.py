"""What was measured of one stage and one microbatch, scaled to every candidate."""

from __future__ import annotations

import dataclasses
import functools

from dualpipe_jax.lowering import Program, lower
from dualpipe_jax.planning.memory_use import (
    Remat,
    StageMemory,
    check_kind,
    check_number,
    memory_of,
    stages_moved,
)
from dualpipe_jax.planning.ranking import RankedSchedule
from dualpipe_jax.schedules import Costs, check_size, simulate
from dualpipe_jax.schedules.generators import SCHEDULES


@dataclasses.dataclass(frozen=True)
class Measured:
    """Costs and bytes of one microbatch on one of P stages.

    Attributes: as the arguments of `rank_schedules`.

    Raises:
      ValueError: one of them is not what it should be, or F is 0.
    """

    costs: Costs
    memory: StageMemory
    measured_at: int
    task_overhead: float
    update_time: float
    exchange_time: float

    def __post_init__(self):
        object.__setattr__(
            self, "measured_at", check_size("measured_at", self.measured_at)
        )
        check_kind("costs", self.costs, Costs)
        check_kind("memory", self.memory, StageMemory)
        check_number("costs.F", self.costs.F, "give what was measured.", positive=True)
        for name in ("task_overhead", "update_time", "exchange_time"):
            number = getattr(self, name)
            number = check_number(name, number, "give it in the unit of costs.")
            object.__setattr__(self, name, number)

    def candidate(
        self, name: str, program: Program, remat: Remat | None, limit: float
    ) -> RankedSchedule:
        """Returns the time and the memory of a schedule, `lowered(name, ...)`."""
        sizes = program.schedule.num_ranks, program.schedule.num_microbatches
        microbatch = self.measured_at / program.schedule.num_microbatches
        costs = self._scaled(program, remat, microbatch)
        makespan, bubble_ratio = _simulated(name, *sizes, costs)
        exchange = self.exchange_time * stages_moved(program)
        return RankedSchedule(
            schedule=name,
            num_microbatches=program.schedule.num_microbatches,
            remat="none" if remat is None else remat.name,
            time=makespan + self.update_time + exchange,
            bubble_ratio=bubble_ratio,
            bubble=bubble_ratio * makespan,
            memory=memory_of(program, self.memory, remat, microbatch),
            limit=limit,
            costs=costs,
            program=program,
        )

    def _scaled(
        self, program: Program, remat: Remat | None, microbatch: float
    ) -> Costs:
        """Returns costs of the program's stages on a microbatch of a relative size."""
        costs = self.costs
        share = microbatch * program.schedule.num_ranks / program.schedule.num_stages

        def part(cost: float, again: float = 0.0) -> float:
            fixed = min(self.task_overhead, cost)
            return fixed + (cost - fixed + again) * share

        again = pair = 0.0
        if remat is not None:
            again = costs.F if remat.cost is None else remat.cost
            pair = again if remat.overlapped_cost is None else remat.overlapped_cost
        return Costs(
            F=part(costs.F),
            I=part(costs.I, again),
            W=part(costs.W),
            B=part(costs.B, again),  # pyright: ignore[reportArgumentType]
            FB=part(costs.FB, pair),  # pyright: ignore[reportArgumentType]
            p2p=costs.p2p * microbatch,
        )


# Building and lowering takes most of the time, up to a second for P=16, M=128, and does
# not depend on costs or memory: ranking again with others should not wait for it.
@functools.lru_cache(maxsize=64)
def lowered(name: str, num_ranks: int, num_microbatches: int) -> Program:
    """Builds and lowers a published schedule.

    Raises:
      ValueError: the schedule does not exist for these sizes.
    """
    return lower(SCHEDULES[name](num_ranks, num_microbatches))


@functools.lru_cache(maxsize=1024)
def _simulated(
    name: str, num_ranks: int, num_microbatches: int, costs: Costs
) -> tuple[float, float]:
    """Returns (makespan, bubble ratio)."""
    timeline = simulate(lowered(name, num_ranks, num_microbatches), costs)
    return timeline.makespan, timeline.bubble_ratio
