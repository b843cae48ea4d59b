"""DualPipeV: one half of DualPipe's mirror image, so no stage is held twice.

The "cut-in-half" of DualPipe (Sea AI Lab, 2025); the order of steps is that of
`deepseek-ai/DualPipe@3da1bbe dualpipev.py`, step by step.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.dualpipe import folded_phases
from dualpipe_jax.schedules.generators.phases import unroll
from dualpipe_jax.schedules.schedule import Schedule, check_size


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns DualPipeV's schedule, in upstream's order.

    Rank `r` holds stages `r` and `2P-1-r`: every microbatch travels upwards through
    stages `0 .. P-1`, turns on the last rank, and travels back down. Each rank does
    what the corresponding rank of DualPipe on 2P ranks does.

    Args:
      num_ranks: P, odd or even, at least 1.
      num_microbatches: M, at least 2P.

    Raises:
      ValueError: a size is illegal.

    Examples:
      >>> print(dualpipev(1, 2).to_csv(), end="")
      0F0,1F0,0F1,1B0,(1F1;0B0)OVERLAP_F_B,1B1,0I1,0W1
    """
    num_ranks = check_size("num_ranks", num_ranks)
    num_microbatches = check_size("num_microbatches", num_microbatches)
    if num_microbatches < 2 * num_ranks:
        raise ValueError(
            f"{num_microbatches=} must be >= 2*{num_ranks=}; use {2 * num_ranks} or "
            "more."
        )
    num_stages = 2 * num_ranks
    steps = tuple(
        unroll(
            folded_phases(num_ranks, rank, num_microbatches),
            stages=(rank, num_stages - 1 - rank),
        )
        for rank in range(num_ranks)
    )
    return Schedule("dualpipev", num_ranks, num_stages, num_microbatches, steps)
