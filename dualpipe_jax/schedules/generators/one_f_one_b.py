"""1F1B: one forward, one backward, so at most P activations are alive.

PipeDream (arXiv:1806.03377, section 3.2), in the flushing form of PipeDream-Flush and
Megatron-LM (arXiv:2104.04473, section 2.2.1), without interleaving.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.phases import unroll
from dualpipe_jax.schedules.schedule import Schedule, check_size


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns 1F1B: bubble (P-1)(F+B), at most min(P, M) activations alive.

    Args:
      num_ranks: P; rank `r` holds stage `r`.
      num_microbatches: M; fewer than P work too, since the warm-up is limited to M
        (torchtitan#774 hung there).

    Raises:
      ValueError: a size is less than 1.

    Examples:
      >>> print(one_f_one_b(2, 3).to_csv(), end="")
      0F0,0F1,0B0,0F2,0B1,0B2
      1F0,1B0,1F1,1B1,1F2,1B2
    """
    num_ranks = check_size("num_ranks", num_ranks)
    num_microbatches = check_size("num_microbatches", num_microbatches)
    steps = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        phases = [
            (warmup, "F0"),
            (num_microbatches - warmup, "F0 B0"),
            (warmup, "B0"),  # cooldown
        ]
        steps.append(unroll(phases, stages=[rank]))
    return Schedule("one_f_one_b", num_ranks, num_ranks, num_microbatches, tuple(steps))
