"""Looped BFS: GPipe with several stages a rank, each for all microbatches at once.

"Breadth-First Pipeline Parallelism" (arXiv:2211.05953, section 4 and figure 4); the
order of tasks is that of torch.distributed.pipelining 2.14, `ScheduleLoopedBFS`.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.rounds import check_interleaved
from dualpipe_jax.schedules.schedule import Schedule, Task


def looped_bfs(
    num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2
) -> Schedule:
    """Returns breadth-first pipeline parallelism, in torch's order.

    Rank `r` holds stages `r, P+r, 2P+r, ...`, each a `v`-th as large as GPipe's. The
    bubble is (P-1)(F+B) of these small stages, a v-th of GPipe's, if M is at least P,
    and all vM of their activations are alive. A stage runs all microbatches in a row,
    so data-parallel collectives of its parameters are needed once a pass. Backwards run
    from the last microbatch to the first.

    Args:
      num_ranks: P.
      num_microbatches: M, at least 1.
      stages_per_rank: v, at least 1.

    Raises:
      ValueError: a size is less than 1.

    Examples:
      >>> print(looped_bfs(2, 2).to_csv(), end="")
      0F0,0F1,2F0,2F1,2B1,2B0,0B1,0B0
      1F0,1F1,3F0,3F1,3B1,3B0,1B1,1B0
    """
    num_ranks, num_microbatches, stages_per_rank = check_interleaved(
        num_ranks, num_microbatches, stages_per_rank
    )
    num_stages, microbatches = num_ranks * stages_per_rank, range(num_microbatches)
    steps = []
    for rank in range(num_ranks):
        stages = range(rank, num_stages, num_ranks)
        forwards = [Task("F", stage, m) for stage in stages for m in microbatches]
        backwards = [task._replace(op="B") for task in reversed(forwards)]
        steps.append(tuple((task,) for task in forwards + backwards))
    return Schedule("looped_bfs", num_ranks, num_stages, num_microbatches, tuple(steps))
