"""Which layers of a model each pipeline stage gets.

Layers differ in cost: the first few may be dense and the others mixtures of experts,
with an embedding in front and a head behind. A pipeline needs contiguous slices of
them, and it is as fast as its slowest *rank*. Ranks often hold several stages, so a
cheap stage can offset an expensive one: DualPipe's ranks r and P-1-r run the stages r
and P-1-r, each for half of the microbatches; DualPipeV's rank r runs r and 2P-1-r.

Megatron-LM (`--pipeline-model-parallel-layout`) takes such an uneven layout from its
user, and torchtitan counts embedding and head as a whole number of layers each. Here
any costs are balanced, by the usual dynamic programming for cutting a chain into
contiguous parts, run from both ends at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from dualpipe_jax.planning import balance
from dualpipe_jax.planning.workload import Workload
from dualpipe_jax.schedules import Schedule, check_size


@dataclasses.dataclass(frozen=True, repr=False)
class Partition:
    """Contiguous slices of a model's layers, one per stage; `print` shows a table.

    `partition_layers` finds the best partition. That is exact whenever each rank holds
    one stage or a stage and its mirror image, s and S-1-s, as in every schedule that is
    generated here: tables over the layers taken from the front and from the back. Other
    assignments, such as interleaved stages of a CSV, are compared one by one up to
    100,000 partitions, which is exact too. Beyond that, a local search from two starts
    moves single layers between any two stages, and `is_optimal` is false.

    Attributes:
      layers: layers of each stage, in model order.
      stage_costs: [num_stages] cost of each stage on one microbatch, in the unit of
        the layers' costs; the first includes the embedding, the last the head.
      rank_costs: [num_ranks] time that each rank needs for one step: the sum of the
        stage's cost over its (stage, microbatch) forward tasks, divided by its speed.
      stage_ranks: the ranks that run each stage.
      is_optimal: whether it is known that no other partition is better.

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
        """Layers of the longest stage; in SPMD, every stage has room for as many."""
        return max(map(len, self.layers))

    @property
    def num_padding_layers(self) -> int:
        """Padding in all stages if every stage has room for `max_layers`."""
        return self.num_stages * self.max_layers - self.num_layers

    @property
    def balancedness(self) -> float:
        """Mean over max of `rank_costs`: 1 if all ranks take equally long."""
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

    A rank's cost is the sum over its forward tasks of the stage's cost, divided by its
    speed. A DualPipe rank, for example, counts the head only for the half of the
    microbatches for which it runs the last stage. Backward passes are assumed to cost
    each layer the same multiple of its forward; if they do not, give the costs of both
    together. Bubbles are not counted; simulate the schedule for those.

    The best partition has

    1. the least cost of the slowest rank; of those,
    2. the fewest layers in the longest stage, because in an SPMD program all stages
       have room for as many and the rest is padding; of those,
    3. the least sum of squares of the stages' costs, the most even one; of those,
    4. the fewest layers in stage 0, then in the last, in stage 1, in the one before
       the last, and so on inwards.

    Costs and sums of squares within 1e-9 of the least count as equal, so rounding
    decides nothing.

    Args:
      costs: [num_layers] of each layer on one microbatch, forward: estimated FLOPs,
        measured seconds or any other unit.
      schedule: says which rank runs which stage on how many microbatches.
      embed_cost: of what stage 0 does before its first layer, in the same unit.
      head_cost: of what the last stage does after its last layer.
      speeds: [num_ranks] work that each rank does per unit of time; equal by default.
      max_layers: the most layers a stage may get; no limit by default.

    Returns:
      The layers of each stage, and what stages and ranks cost.

    Raises:
      ValueError: there are fewer layers than stages, or more than `max_layers` allows;
        a cost or speed is not a positive finite number (`embed_cost` and `head_cost`
        may be 0); or `speeds` does not have one entry per rank.

    References:
      DeepSeek-V3 Technical Report (arXiv:2412.19437), section 3.2.1, for which rank
      holds which stage. Megatron Core, "Custom Pipeline Model Parallel Layout".

    Examples:
      Two cheap layers in front, and a head as expensive as a layer and a half. The
      ranks 0 and 3 share the stages 0 and 3, the ranks 1 and 2 the other two:

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
    work = Workload.read(costs, schedule, embed_cost, head_cost, speeds)
    cap = _read_cap(max_layers, len(work.layers), schedule.num_stages)
    sizes, is_optimal = balance.solve(work.problem(cap))
    stops = itertools.accumulate(sizes)
    layers = tuple(
        tuple(range(stop - size, stop)) for size, stop in zip(sizes, stops, strict=True)
    )
    stage_costs = tuple(map(work.stage_cost, layers))
    return Partition(
        layers=layers,
        stage_costs=stage_costs,
        rank_costs=work.rank_costs(stage_costs),
        stage_ranks=tuple(
            tuple(np.flatnonzero(column).tolist()) for column in work.counts.T
        ),
        is_optimal=is_optimal,
    )


def _read_cap(max_layers: int | None, num_layers: int, num_stages: int) -> int:
    """Returns the most layers a stage may have."""
    cap = num_layers if max_layers is None else check_size("max_layers", max_layers)
    if cap * num_stages < num_layers:
        raise ValueError(
            f"{max_layers=} leaves room for {cap * num_stages} of {num_layers} layers "
            f"in {num_stages} stages; use {-(-num_layers // num_stages)} or more."
        )
    return cap
