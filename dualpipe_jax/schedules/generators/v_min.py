"""V-Min: two stages a rank in a V, with a third of 1F1B's activations.

"Pipeline Parallelism with Controllable Memory" (arXiv:2405.15362, section 3); the
building block is that of `sail-sg/zero-bubble-pipeline-parallelism` zbv_greedy.py.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.building_blocks import repeat_blocks
from dualpipe_jax.schedules.schedule import Schedule, check_size


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns V-Min: a third of 1F1B's activations.

    Rank `r` holds stages `r` and `2P-1-r`, as for `dualpipev`. At most `(P+4) // 3`
    activations of a whole stage are alive, each as two of half a stage, where 1F1B
    holds P. At F=I=W the bubble is less than 4P of such a half's F; 1F1B's is 6(P-1).
    At other costs, ranks wait for every microbatch, since nothing is held in reserve.

    Args:
      num_ranks: P.
      num_microbatches: M, at least 1.

    Raises:
      ValueError: a size is less than 1.

    Examples:
      >>> print(v_min(2, 2).to_csv(), end="")
      0F0,0F1,3F0,3I0,3W0,3F1,0I0,3I1,0W0,3W1,0I1,0W1
      1F0,2F0,1F1,2F1,2I0,1I0,2W0,1W0,2I1,1I1,2W1,1W1
    """
    num_ranks = check_size("num_ranks", num_ranks)
    num_microbatches = check_size("num_microbatches", num_microbatches)
    # One unit from rank to rank. For a multiple of three, waiting at the top keeps the
    # times of a rank different modulo the period.
    top = 2 * num_ranks + (2 if num_ranks % 3 == 0 else 0)
    end = top + 2 * num_ranks - 1
    blocks = [
        (rank, 2 * num_ranks - 1 - rank, top + rank, end - rank)
        for rank in range(num_ranks)
    ]
    return repeat_blocks("v_min", blocks, num_microbatches)
