"""Which layers of a model each pipeline stage gets.

Layers differ in cost: the first few may be dense and the others mixtures of experts,
with an embedding in front and a head behind. A pipeline needs contiguous slices of
them, and it is as fast as its slowest *rank*. Ranks often keep several stages, so that
a dear stage may be offset by a cheap one: DualPipe's ranks r and P-1-r run the stages
r and P-1-r, each for half of the microbatches; DualPipeV's rank r runs r and 2P-1-r.

Megatron-LM (`--pipeline-model-parallel-layout`) takes such an uneven layout from its
user, and torchtitan counts embedding and head as so many layers each, in whole layers.
Here any costs are balanced, by the dynamic programming that is usual for cutting a
chain into contiguous parts, from both ends at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dualpipe_jax.planning import balance as _balance
from dualpipe_jax.schedules import Schedule, check_size


@dataclasses.dataclass(frozen=True, repr=False)
class Partition:
    """Contiguous slices of a model's layers, one a stage. `print` shows it as a table.

    Attributes:
      layers: layers of each stage, in model order.
      stage_costs: [num_stages] cost of each stage on one microbatch, in the unit of
        the layers' costs; the embedding's is in the first, the head's in the last.
      rank_costs: [num_ranks] time that each rank needs for one step: the sum of the
        stage's cost over its (stage, microbatch) forward tasks, divided by its speed.
      stage_ranks: the ranks that run each stage.
      is_optimal: whether no other partition is better; `False` where that was too
        much to prove.

    Raises:
      ValueError: the layers are not 0, 1, 2, ... in order, or a stage has none.

    Examples:
      >>> from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
      >>> partition_layers([1, 1, 1, 1, 2, 2], one_f_one_b(2, 8))
      Partition(6 layers in 2 stages of up to 4: slowest rank 0.0 % more than the mean)
    """

    layers: tuple[tuple[int, ...], ...]
    stage_costs: tuple[float, ...]
    rank_costs: tuple[float, ...]
    stage_ranks: tuple[tuple[int, ...], ...]
    is_optimal: bool = True

    def __post_init__(self):
        flat = [layer for stage in self.layers for layer in stage]
        if flat != list(range(len(flat))) or not all(self.layers):
            raise ValueError(
                f"layers={self.layers} must be 0, 1, 2, ... in order, with one or more "
                "in every stage; use partition_layers."
            )
        for name in ("stage_costs", "stage_ranks"):
            if len(getattr(self, name)) != self.num_stages:
                raise ValueError(
                    f"{name}={getattr(self, name)} must have one entry for each of the "
                    f"{self.num_stages} stages of layers."
                )

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.layers))

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def max_layers(self) -> int:
        """Layers of the longest stage: what every stage has room for in SPMD."""
        return max(map(len, self.layers))

    @property
    def num_padding_layers(self) -> int:
        """Empty slots if every stage has room for `max_layers`."""
        return self.num_stages * self.max_layers - self.num_layers

    @property
    def balancedness(self) -> float:
        """Mean over max of `rank_costs`: 1 if all ranks need equally long."""
        return math.fsum(self.rank_costs) / len(self.rank_costs) / max(self.rank_costs)

    def __repr__(self) -> str:
        return (
            f"Partition({self.num_layers} layers in {self.num_stages} stages of up to "
            f"{self.max_layers}: slowest rank {self._excess} than the mean)"
        )

    def __str__(self) -> str:
        rows = [("stage", "ranks", "layers", "cost")]
        for stage, layers in enumerate(self.layers):
            ranks = ", ".join(map(str, self.stage_ranks[stage]))
            span = "-".join(
                str(layer) for layer in dict.fromkeys((layers[0], layers[-1]))
            )
            rows.append((str(stage), ranks, span, f"{self.stage_costs[stage]:.6g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) for cell, width in zip(row, widths, strict=True)
            )
            for row in rows
        ]
        slowest = self.rank_costs.index(max(self.rank_costs))
        lines += [
            f"the slowest rank ({slowest}) needs {self.rank_costs[slowest]:.6g}, "
            f"{self._excess} than the mean;",
            f"{self.num_padding_layers} padding layers in {self.num_stages} stages x "
            f"{self.max_layers}",
        ]
        if not self.is_optimal:
            lines.append("found by local search: there may be a better partition")
        return "\n".join(lines)

    @property
    def _excess(self) -> str:
        return f"{100 * (1 / self.balancedness - 1):.1f} % more"


def partition_layers(
    costs: Sequence[float],
    schedule: Schedule,
    *,
    embed_cost: float = 0.0,
    head_cost: float = 0.0,
    speeds: Sequence[float] | None = None,
    max_layers: int | None = None,
) -> Partition:
    """Returns the best contiguous partition of a model's layers over a schedule.

    A rank's cost is the work that it has: the sum over its forward tasks of the
    stage's cost, over its speed. So a DualPipe rank counts the head for the half of the
    microbatches for which it runs the last stage. Backward passes are taken to cost
    each layer the same multiple of its forward; where they do not, give costs of both
    together. Bubbles are not counted; simulate the schedule for those.

    The best partition is that with

    1. the least cost of the slowest rank; of those,
    2. the fewest layers in the longest stage, because in an SPMD program all stages
       have room for as many and the rest is padding; of those,
    3. the least sum of squares of the stages' costs, the most even one; of those,
    4. the fewest layers in stage 0, then in the last, in stage 1, in the one before
       the last, and so on inwards.

    Costs and sums of squares within 1e-9 of the least count as equal, so that rounding
    decides nothing.

    That is exact whenever a rank's stages are one and its mirror image s, S-1-s, as
    in every schedule that is generated here: tables over the layers taken from the
    front and from the back. Other assignments, such as interleaved stages of a CSV,
    are compared one by one up to 100,000 partitions, which is exact too; beyond that,
    a local search from two starts moves single layers between any two stages, and
    `is_optimal` is false.

    Args:
      costs: [num_layers] of each layer on one microbatch, forward: estimated FLOPs,
        measured seconds or any other unit.
      schedule: says which rank runs which stage on how many microbatches.
      embed_cost: of what stage 0 does before its first layer, in the same unit.
      head_cost: of what the last stage does after its last layer.
      speeds: [num_ranks] work that each rank does per unit of time; equal by default.
      max_layers: no stage gets more layers; no limit by default.

    Returns:
      The layers of each stage, and what stages and ranks cost.

    Raises:
      ValueError: there are fewer layers than stages, or more than `max_layers` allows;
        a cost or speed is not a positive finite number (`embed_cost` and `head_cost`
        may be 0); or there is not one speed a rank.

    References:
      DeepSeek-V3 Technical Report (arXiv:2412.19437), section 3.2.1, for who holds
      which stage. Megatron Core, "Custom Pipeline Model Parallel Layout".

    Examples:
      Two cheap layers in front, and a head as costly as a layer and a half. The ranks
      0 and 3 share the stages 0 and 3, the ranks 1 and 2 the other two:

      >>> from dualpipe_jax.schedules.generators.dualpipe import dualpipe
      >>> print(partition_layers([0.5] * 2 + [1.0] * 9, dualpipe(4, 8), head_cost=1.5))
      stage  ranks  layers  cost
          0   0, 3     0-2     2
          1   1, 2     3-5     3
          2   1, 2     6-8     3
          3   0, 3    9-10   3.5
      the slowest rank (1) needs 24, 4.3 % more than the mean;
      1 padding layers in 4 stages x 3
    """
    layer_costs = _numbers("costs", costs)
    ends = (_end_cost("embed_cost", embed_cost), _end_cost("head_cost", head_cost))
    num_layers, num_stages = len(layer_costs), schedule.num_stages
    if num_layers < num_stages:
        raise ValueError(
            f"costs has {num_layers} layers, fewer than the {num_stages} stages of "
            f"{schedule}; use fewer ranks, so that every stage has a layer."
        )
    cap = num_layers if max_layers is None else check_size("max_layers", max_layers)
    if cap * num_stages < num_layers:
        raise ValueError(
            f"{max_layers=} leaves room for {cap * num_stages} of {num_layers} layers "
            f"in {num_stages} stages; use {-(-num_layers // num_stages)} or more."
        )
    rates = (
        np.ones(schedule.num_ranks) if speeds is None else _numbers("speeds", speeds)
    )
    if len(rates) != schedule.num_ranks:
        raise ValueError(
            f"speeds has {len(rates)} entries, but {schedule} has "
            f"{schedule.num_ranks} ranks; give one a rank."
        )
    counts = _forward_counts(schedule)
    with_ends = layer_costs.copy()
    with_ends[0] += ends[0]
    with_ends[-1] += ends[1]
    sizes, is_optimal = _balance.solve(
        _balance.Problem(with_ends, counts / rates[:, None], cap)
    )
    stops = np.cumsum(sizes).tolist()
    layers = tuple(
        tuple(range(stop - size, stop)) for size, stop in zip(sizes, stops, strict=True)
    )
    stage_costs = tuple(
        math.fsum(
            [
                *layer_costs[list(stage)].tolist(),
                ends[0] * (stage[0] == 0),
                ends[1] * (stage[-1] == num_layers - 1),
            ]
        )
        for stage in layers
    )
    return Partition(
        layers=layers,
        stage_costs=stage_costs,
        rank_costs=tuple(
            math.fsum(np.multiply(row, stage_costs).tolist()) / rate
            for row, rate in zip(counts, rates.tolist(), strict=True)
        ),
        stage_ranks=tuple(
            tuple(np.flatnonzero(column).tolist()) for column in counts.T
        ),
        is_optimal=is_optimal,
    )


def _forward_counts(schedule: Schedule) -> np.ndarray:
    """[num_ranks, num_stages]: on how many microbatches a rank runs a stage."""
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
    """[n] float64, all positive and finite."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}={values!r} must be a sequence of positive numbers."
        ) from None
    if numbers.ndim != 1:
        raise ValueError(
            f"{name} has shape {numbers.shape}, but must have one axis; give one "
            f"number a {'layer' if name == 'costs' else 'rank'}."
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
