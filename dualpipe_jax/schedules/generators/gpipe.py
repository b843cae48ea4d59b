"""GPipe: all forwards, then all backwards; the simplest schedule, the baseline.

GPipe (arXiv:1811.06965, section 2.2 and figure 2c), without its recomputation.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.phases import unroll
from dualpipe_jax.schedules.schedule import Schedule, check_size


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns GPipe's schedule: bubble (P-1)(F+B), all M activations alive.

    Backwards run in the order of the forwards, as in torch.distributed.pipelining; the
    paper's figure reverses them. This only changes the order in which gradients are
    summed, which is then that of 1F1B.

    Args:
      num_ranks: P; rank `r` holds stage `r`.
      num_microbatches: M, at least 1.

    Raises:
      ValueError: a size is less than 1.

    Examples:
      >>> print(gpipe(2, 2).to_csv(), end="")
      0F0,0F1,0B0,0B1
      1F0,1F1,1B0,1B1
    """
    num_ranks = check_size("num_ranks", num_ranks)
    num_microbatches = check_size("num_microbatches", num_microbatches)
    steps = tuple(
        unroll([(num_microbatches, "F0"), (num_microbatches, "B0")], stages=[rank])
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_ranks, num_ranks, num_microbatches, steps)
