"""What `partition_layers` divides, read from its arguments."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dualpipe_jax.planning.problem import PartitionProblem
from dualpipe_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Workload:
    """What layers cost, and how often and how fast each rank runs each stage.

    Attributes:
      layers: [num_layers] cost of each layer.
      embed: cost of what comes before the first layer.
      head: cost of what comes after the last one.
      counts: [num_ranks, num_stages] microbatches for which a rank runs a stage.
      speeds: [num_ranks] work per unit of time.
    """

    layers: np.ndarray
    embed: float
    head: float
    counts: np.ndarray
    speeds: np.ndarray

    @classmethod
    def read(
        cls,
        costs: Sequence[float],
        schedule: Schedule,
        embed_cost: float,
        head_cost: float,
        speeds: Sequence[float] | None,
    ) -> Workload:
        """Checks the arguments of `partition_layers`."""
        layers = _numbers("costs", costs)
        embed = _end_cost("embed_cost", embed_cost)
        head = _end_cost("head_cost", head_cost)
        if len(layers) < schedule.num_stages:
            raise ValueError(
                f"costs has {len(layers)} layers, fewer than the {schedule.num_stages} "
                f"stages of {schedule}; use fewer ranks, so that every stage has a "
                "layer."
            )
        if speeds is None:
            speeds = [1.0] * schedule.num_ranks
        rates = _numbers("speeds", speeds)
        if len(rates) != schedule.num_ranks:
            raise ValueError(
                f"speeds has {len(rates)} entries, but {schedule} has "
                f"{schedule.num_ranks} ranks; give one per rank."
            )
        return cls(layers, embed, head, _forward_counts(schedule), rates)

    def problem(self, cap: int) -> PartitionProblem:
        """Returns the problem to solve, with at most `cap` layers in a stage."""
        costs = self.layers.copy()
        costs[0] += self.embed
        costs[-1] += self.head
        return PartitionProblem(costs, self.counts / self.speeds[:, None], cap)

    def stage_cost(self, stage: tuple[int, ...]) -> float:
        """Returns the cost of a stage on one microbatch, summed exactly."""
        ends = (
            self.embed * (stage[0] == 0),
            self.head * (stage[-1] == len(self.layers) - 1),
        )
        return math.fsum([*self.layers[list(stage)].tolist(), *ends])

    def rank_costs(self, stage_costs: tuple[float, ...]) -> tuple[float, ...]:
        """Returns the time of each rank for one step."""
        return tuple(
            math.fsum(np.multiply(row, stage_costs).tolist()) / speed
            for row, speed in zip(self.counts, self.speeds.tolist(), strict=True)
        )


def _forward_counts(schedule: Schedule) -> np.ndarray:
    """Counts microbatches for which a rank runs a stage: [num_ranks, num_stages]."""
    tasks = Counter(
        (rank, task.stage)
        for rank, _, step in schedule
        for task in step
        if task.op == "F"
    )
    counts = np.zeros((schedule.num_ranks, schedule.num_stages))
    for where, count in tasks.items():
        counts[where] = count
    return counts


def _numbers(name: str, values: Any) -> np.ndarray:
    """Reads [n] float64, all positive and finite."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}={values!r} must be a sequence of positive numbers."
        ) from None
    if numbers.ndim != 1:
        raise ValueError(
            f"{name} has shape {numbers.shape}, but must have one axis; give one "
            f"number per {'layer' if name == 'costs' else 'rank'}."
        )
    bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers > 0)))
    if len(bad):
        raise ValueError(
            f"{name}[{bad[0]}]={numbers[bad[0]]} must be positive and finite; give "
            f"{'an estimate' if name == 'costs' else 'a relative speed, such as 1.0'}."
        )
    return numbers


def _end_cost(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{name}={value!r} must be a finite number >= 0; give it in the unit of "
            "costs."
        )
    return number
