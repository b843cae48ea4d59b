"""V-Half: two stages a rank in a V, with half of 1F1B's activations.

"Pipeline Parallelism with Controllable Memory" (arXiv:2405.15362, section 3); the
building block is that of `sail-sg/zero-bubble-pipeline-parallelism` zbv_greedy.py.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.building_blocks import repeat_blocks
from dualpipe_jax.schedules.schedule import Schedule, check_size


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns V-Half: half of 1F1B's activations, and half of its bubble.

    Rank `r` holds stages `r` and `2P-1-r`, as for `dualpipev`. At most `(P+2) // 2`
    activations of a whole stage are alive, each as two of half a stage, where 1F1B
    holds P. At F=I=W and M of at least P, the bubble is less than 3P of such a half's
    F; 1F1B's is 6(P-1). At other costs, no rank waits in the steady state as long as
    2F <= W + 2I and 2I <= W + 2F.

    Args:
      num_ranks: P.
      num_microbatches: M, at least 1.

    Raises:
      ValueError: a size is less than 1.

    Examples:
      >>> print(v_half(2, 2).to_csv(), end="")
      0F0,0F1,3F0,3I0,3W0,3F1,3I1,0I0,3W1,0I1,0W0,0W1
      1F0,2F0,1F1,2F1,2I0,1I0,2W0,2I1,1I1,1W0,2W1,1W1
    """
    num_ranks = check_size("num_ranks", num_ranks)
    num_microbatches = check_size("num_microbatches", num_microbatches)
    # Down the V with two units from rank to rank, and back with one. For an even P,
    # waiting at the top keeps the times of a rank different modulo the period.
    top = 3 * num_ranks + (2 if num_ranks % 2 == 0 else -1)
    end = top + 3 * num_ranks - 1
    blocks = [
        (2 * rank, 3 * num_ranks - 2 - rank, top + 2 * rank, end - rank)
        for rank in range(num_ranks)
    ]
    return repeat_blocks("v_half", blocks, num_microbatches)
