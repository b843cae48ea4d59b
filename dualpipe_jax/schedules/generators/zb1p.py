"""ZB1P: 1F1B with a split backward, and W placed where 1F1B would wait.

ZB-H1 of "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241, section 2.1 and
figure 3, top); DeepSeek calls it ZB1P. The paper calls B what is I here.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.phases import unroll
from dualpipe_jax.schedules.schedule import Schedule, check_size


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns ZB-H1: bubble (P-1)(F+B-2W) at F=I=W, with no more memory than 1F1B.

    Rank `r` runs each W `r` microbatches after its I. Since its warm-up holds P-r
    activations, every rank then holds P, as 1F1B's first rank does.

    Args:
      num_ranks: P; rank `r` holds stage `r`.
      num_microbatches: M, at least 1.

    Raises:
      ValueError: a size is less than 1.

    Examples:
      >>> print(zb1p(2, 3).to_csv(), end="")
      0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2
      1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2
    """
    num_ranks = check_size("num_ranks", num_ranks)
    num_microbatches = check_size("num_microbatches", num_microbatches)
    steps = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        lag = min(rank, num_microbatches)
        pairs = num_microbatches - warmup
        without_w = min(lag, pairs)
        phases = [
            (warmup, "F0"),
            (without_w, "F0 I0"),
            (pairs - without_w, "F0 I0 W"),
            (lag - without_w, "I0"),  # only when there are few microbatches
            (warmup - (lag - without_w), "I0 W"),  # cooldown
            (lag, "W"),
        ]
        steps.append(unroll(phases, stages=[rank]))
    return Schedule("zb1p", num_ranks, num_ranks, num_microbatches, tuple(steps))
