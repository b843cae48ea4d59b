"""Interleaved 1F1B: several stages a rank, so that the pipeline fills sooner.

Megatron-LM (arXiv:2104.04473, section 2.2.2 and figure 4, bottom); the order of tasks
is that of torch.distributed.pipelining 2.14, `ScheduleInterleaved1F1B`.
"""

from __future__ import annotations

from dualpipe_jax.schedules.generators.rounds import Rounds
from dualpipe_jax.schedules.schedule import Schedule


def interleaved_1f1b(
    num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2
) -> Schedule:
    """Returns interleaved 1F1B, in torch's order.

    Rank `r` holds stages `r, P+r, 2P+r, ...`, each a `v`-th as large as 1F1B's. The
    bubble is (P-1)(F+B) of these small stages, a v-th of 1F1B's, and at most vP + P - 1
    of their activations are alive, 1 + (P-1)/(vP) times as many bytes. Every message
    is as large as before, and there are v times as many.

    Args:
      num_ranks: P.
      num_microbatches: M, at best a multiple of P. Otherwise it must be a multiple of
        `M // P`, the number of rounds.
      stages_per_rank: v, at least 1.

    Raises:
      ValueError: a size is less than 1, or M has no equal rounds.

    Examples:
      >>> print(interleaved_1f1b(2, 2).to_csv(), end="")
      0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
      1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1
    """
    rounds = Rounds.of(num_ranks, num_microbatches, stages_per_rank)
    orders = []
    for rank in range(rounds.num_ranks):
        warmup = rounds.warmup(rank, per_hop=2)
        forwards, backwards = rounds.forwards(rank), rounds.backwards("B", rank)
        order = forwards[:warmup]
        for pair in zip(forwards[warmup:], backwards, strict=False):
            order += pair
        order += backwards[rounds.num_tasks - warmup :]  # cooldown
        orders.append(order)
    return rounds.schedule("interleaved_1f1b", orders)
