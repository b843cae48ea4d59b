"""Interleaved stages: who runs which of several stages a rank, and in which order.

Rank `r` holds stages `r, P + r, 2P + r, ...`. Microbatches pass in rounds of about P: a
rank runs a whole round through one of its stages before it goes on to the next one, so
that the round returns from the last rank by the time that the first one is ready for
it.

Megatron-LM (arXiv:2104.04473, section 2.2.2) has rounds of exactly P microbatches. They
may be larger here, as in torch.distributed.pipelining.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dualpipe_jax.schedules.schedule import Schedule, Task, check_size


class Rounds(NamedTuple):
    """Sizes of an interleaved schedule, checked.

    Attributes:
      num_ranks: P.
      num_microbatches: M.
      stages_per_rank: v.
      size: microbatches of one round; it divides M.
    """

    num_ranks: int
    num_microbatches: int
    stages_per_rank: int
    size: int

    @classmethod
    def of(cls, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Rounds:
        """Returns as many rounds as there are whole multiples of P in M, at least one.

        Raises:
          ValueError: a size is less than 1, or the rounds would not be equal.

        Examples:
          >>> Rounds.of(4, 10, 2).size
          5
          >>> Rounds.of(4, 11, 2)
          Traceback (most recent call last):
          ValueError: num_microbatches=11 must be a multiple of its 2 rounds of...
        """
        num_ranks, num_microbatches, stages_per_rank = check_interleaved(
            num_ranks, num_microbatches, stages_per_rank
        )
        count = max(1, num_microbatches // num_ranks)
        size, rest = divmod(num_microbatches, count)
        if rest:
            fewer = num_microbatches - num_microbatches % num_ranks
            raise ValueError(
                f"{num_microbatches=} must be a multiple of its {count} rounds of "
                f"{num_ranks=} or more microbatches; use {fewer} or "
                f"{fewer + num_ranks}, multiples of num_ranks."
            )
        return cls(num_ranks, num_microbatches, stages_per_rank, size)

    @property
    def num_tasks(self) -> int:
        """Forwards of one rank."""
        return self.num_microbatches * self.stages_per_rank

    def forwards(self, rank: int) -> list[Task]:
        """Returns a rank's F in order: round by round, the earliest stage first."""
        return self._in_rounds("F", rank, range(self.stages_per_rank))

    def backwards(self, op: str, rank: int) -> list[Task]:
        """Returns a rank's B, or I, in order: the latest stage first."""
        return self._in_rounds(op, rank, reversed(range(self.stages_per_rank)))

    def warmup(self, rank: int, per_hop: int) -> int:
        """Returns how many F a rank runs before its first backward begins.

        The last rank must have reached its last stage, and each rank before it is
        `per_hop` further ahead.
        """
        last = (self.stages_per_rank - 1) * self.size
        return min(last + per_hop * (self.num_ranks - 1 - rank), self.num_tasks)

    def schedule(self, kind: str, orders: Sequence[Sequence[Task]]) -> Schedule:
        """Returns the schedule in which each rank runs its tasks one by one."""
        return Schedule(
            kind,
            self.num_ranks,
            self.num_ranks * self.stages_per_rank,
            self.num_microbatches,
            tuple(tuple((task,) for task in order) for order in orders),
        )

    def _in_rounds(self, op: str, rank: int, chunks) -> list[Task]:
        chunks = tuple(chunks)
        return [
            Task(op, chunk * self.num_ranks + rank, first + k)
            for first in range(0, self.num_microbatches, self.size)
            for chunk in chunks
            for k in range(self.size)
        ]


def check_interleaved(
    num_ranks: int, num_microbatches: int, stages_per_rank: int
) -> tuple[int, int, int]:
    """Returns the sizes as plain ints.

    Raises:
      ValueError: a size is no integer, or less than 1.
    """
    return (
        check_size("num_ranks", num_ranks),
        check_size("num_microbatches", num_microbatches),
        check_size("stages_per_rank", stages_per_rank),
    )
