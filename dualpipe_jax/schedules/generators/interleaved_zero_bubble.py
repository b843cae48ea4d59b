"""Interleaved zero bubble: ZB1P with several stages a rank.

ZB-H1 of "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241, section 2.1), interleaved
as in Megatron-LM (arXiv:2104.04473, section 2.2.2); the order of tasks is that of
torch.distributed.pipelining 2.14, `ScheduleInterleavedZeroBubble`.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.rounds import Rounds
from dualpipe_jax.schedules.schedule import Schedule


def interleaved_zero_bubble(
    num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2
) -> Schedule:
    """Returns ZB1P with interleaved stages, in torch's order.

    Rank `r` holds stages `r, P+r, 2P+r, ...`, each a `v`-th as large as ZB1P's, and
    runs each W `r` backwards after its I. At F=I=W the bubble is (P-1)(F+I-W) of these
    small stages, a v-th of ZB1P's, and every rank holds at most vP of their
    activations, as many bytes as ZB1P.

    Args:
      num_ranks: P.
      num_microbatches: M, at best a multiple of P. Otherwise it must be a multiple of
        `M // P`, the number of rounds.
      stages_per_rank: v, at least 1; with 1, this is `zb1p`.

    Raises:
      ValueError: a size is less than 1, or M has no equal rounds.

    Examples:
      >>> print(interleaved_zero_bubble(2, 2).to_csv(), end="")
      0F0,0F1,2F0,2F1,2I0,2W0,2I1,2W1,0I0,0W0,0I1,0W1
      1F0,1F1,3F0,3I0,3F1,3I1,3W0,1I0,3W1,1I1,1W0,1W1
    """
    rounds = Rounds.of(num_ranks, num_microbatches, stages_per_rank)
    orders = []
    for rank in range(rounds.num_ranks):
        warmup = rounds.warmup(rank, per_hop=1)
        forwards, backwards = rounds.forwards(rank), rounds.backwards("I", rank)
        weights = [task._replace(op="W") for task in backwards]
        order = forwards[:warmup]
        for k, backward in enumerate(backwards):
            order += forwards[warmup + k : warmup + k + 1]
            order.append(backward)
            order += weights[k - rank : k - rank + 1] if k >= rank else ()
        order += weights[max(0, rounds.num_tasks - rank) :]
        orders.append(order)
    return rounds.schedule("interleaved_zero_bubble", orders)
