"""DualPipe: microbatches enter at both ends and meet in overlapped F&B pairs.

DeepSeek-V3 Technical Report (arXiv:2412.19437), section 3.2.1 and figure 5; the
order of steps is that of `deepseek-ai/DualPipe@3da1bbe dualpipe.py`, step by step.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.phases import Phase, unroll
from dualpipe_jax.schedules.schedule import Schedule, check_size


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns DualPipe's schedule, in upstream's order.

    Rank `r` holds stage `r` for microbatches `0 .. M/2-1`, which travel upwards
    (direction 0), and stage `P-1-r` for `M/2 .. M-1`, which travel downwards
    (direction 1). The bubble is (P/2-1)(F&B + B - 3W), and at most P+1 activations are
    alive.

    Args:
      num_ranks: P, even.
      num_microbatches: M over both directions, even and at least 2P.

    Raises:
      ValueError: a size is illegal.

    Examples:
      >>> schedule = dualpipe(4, 8)
      >>> print(schedule.to_csv().splitlines()[3][:51])
      0F4,0F5,0F6,3F0,3I0,3W0,3F1,(0F7;3B1)OVERLAP_F_B,(3
    """
    num_ranks = check_size("num_ranks", num_ranks)
    num_microbatches = check_size("num_microbatches", num_microbatches)
    if num_ranks % 2:
        raise ValueError(
            f"{num_ranks=} must be even, since ranks r and P-1-r mirror each other; "
            "use an even number, or dualpipev."
        )
    if num_microbatches % 2 or num_microbatches < 2 * num_ranks:
        raise ValueError(
            f"{num_microbatches=} must be even and >= 2*{num_ranks=}; use "
            f"{max(num_microbatches + num_microbatches % 2, 2 * num_ranks)} or more "
            "(an even number)."
        )
    depth, half = num_ranks // 2, num_microbatches // 2
    steps = []
    for rank in range(num_ranks):
        # Upstream's phase 0 is the direction that enters at the nearer end.
        distance = min(rank, num_ranks - 1 - rank)
        near = 0 if rank < depth else 1
        own, first = (rank, num_ranks - 1 - rank), (0, half)
        steps.append(
            unroll(
                folded_phases(depth, distance, half),
                stages=(own[near], own[1 - near]),
                first_microbatches=(first[near], first[1 - near]),
            )
        )
    return Schedule("dualpipe", num_ranks, num_ranks, num_microbatches, tuple(steps))


def folded_phases(depth: int, distance: int, num_microbatches: int) -> list[Phase]:
    """Returns the eight phases of a rank at `distance` from the outer end of a fold.

    `depth` ranks lie between the outer end, where direction 0 enters and direction
    1 leaves, and the fold, where one turns into the other: ranks 0 .. P/2-1 of
    DualPipe, and all ranks of DualPipeV. `num_microbatches` counts one direction.

    The phase names are upstream's; its zero-bubble B is I here, followed by the
    matching W as a separate step.
    """
    inner = depth - 1 - distance  # ranks between this one and the fold
    outer = distance + 1
    main = num_microbatches - 2 * depth + outer
    # Next to the fold the first pair would make the F's consumer wait for the B.
    opening = "F0&B1 F1&B0" if inner else "F0 B1 F1&B0"
    # Step 6 is B1 B0 B1 B0 ...; its second half leaves W to steps 7 and 8.
    draining = [f"{'B' if k < outer else 'I'}{1 - k % 2}" for k in range(2 * outer)]
    return [
        (2 * inner, "F0"),  # step 1
        (outer, "F0 F1"),  # step 2
        (inner, "I1 W F1"),  # step 3
        (1, opening),  # step 4, the main step
        (main - 1, "F0&B1 F1&B0"),
        (inner, "B1 F1&B0"),  # step 5
        (1, " ".join(draining)),  # step 6
        (inner, "W I0"),  # step 7
        (outer, "W"),  # step 8
    ]
