"""ZB-V: two stages a rank in the shape of a V, and no bubble between its tasks.

"Zero Bubble Pipeline Parallelism" (arXiv:2401.10241, section 6 and figure 6); the order
of tasks is that of torch.distributed.pipelining 2.14, `ScheduleZBVZeroBubble`.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.phases import unroll
from dualpipe_jax.schedules.schedule import Schedule, Step, check_size


def zbv(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns ZB-V, in torch's order.

    Rank `r` holds stages `r` and `2P-1-r`, as for `dualpipev`. At F=I=W and M of at
    least 2P-1, a rank never waits from its first task to its last; what is left of the
    bubble, P-1 tasks, is that the ranks start one after the other. At most 2P
    activations of half a stage are alive, as many bytes as 1F1B.

    Args:
      num_ranks: P.
      num_microbatches: M, at least 1.

    Raises:
      ValueError: a size is less than 1.

    Examples:
      >>> print(zbv(2, 3).to_csv(), end="")
      0F0,0F1,0F2,3F0,3I0,3W0,3F1,3I1,3W1,0I0,0W0,3F2,3I2,3W2,0I1,0W1,0I2,0W2
      1F0,2F0,1F1,2F1,2I0,2W0,1F2,1I0,1W0,2F2,2I1,2W1,1I1,2I2,1I2,1W1,2W2,1W2
    """
    num_ranks = check_size("num_ranks", num_ranks)
    num_microbatches = check_size("num_microbatches", num_microbatches)
    return Schedule(
        "zbv",
        num_ranks,
        2 * num_ranks,
        num_microbatches,
        tuple(
            _rank_steps(num_ranks, num_microbatches, rank) for rank in range(num_ranks)
        ),
    )


def _rank_steps(num_ranks: int, num_microbatches: int, rank: int) -> tuple[Step, ...]:
    """Unrolls a rank's phases for enough microbatches to fill the V, as torch does.

    Fewer are the same order without the tasks of those that do not exist.
    """
    enough = max(num_microbatches, 2 * num_ranks - 1)
    inner = num_ranks - 1 - rank  # ranks between this one and the turn
    phases = [
        # Warm-up: the V is filled.
        (2 * inner + 1, "F0"),
        (rank, "F1 F0"),
        (inner + 1, "F1 I1 W1"),
        # Steady state, until the forwards have run out.
        (enough - num_ranks - inner, "F0 I0 W0 F1 I1 W1"),
        (inner, "I0 W0 F1 I1 W1"),
        # Cool-down: W waits where others need an I.
        (rank, "I0 I1"),
        (inner + 1, "I0 W0"),
        (rank, "W1"),
        (rank, "W0"),
    ]
    steps = unroll(phases, stages=(rank, 2 * num_ranks - 1 - rank))
    return tuple(step for step in steps if step[0].microbatch < num_microbatches)
