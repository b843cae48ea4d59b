"""V-shaped schedules with less memory, from a repeated building block.

"Pipeline Parallelism with Controllable Memory" (arXiv:2405.15362): what one microbatch
does on every rank is a *building block*. Repeated once per period, it is a schedule in
which a rank holds as many activations as fit between an F and its W: the block's
lifespan decides the memory. Sections 2 and 3 describe repeating, reordering and
squeezing, as here:

1. A block begins every six units of time (a rank has F, I and W of two stages), and
   each W runs in the first idle unit after its I.
2. Reorder: before the first microbatch is back at rank 0, and after the last one has
   left it, every task moves to the earliest idle unit after its inputs. An F moves only
   as far as the rank then holds no more activations than the repeated blocks do on any
   rank. The steady state between them keeps what slack its blocks have for costs that
   differ.
3. After a rank's last F, I come before W, which only its own rank waits for. This
   shortens the cool-down.
4. Squeeze: only the order of a rank's tasks is kept, and each starts when it can.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from dualpipe_jax.schedules.schedule import Schedule, Step, Task

PERIOD = 6
# When a rank begins the tasks of its block: F of its first stage (on the way down the
# V) and of its second (on the way back), then I of the second and of the first.
Block = tuple[int, int, int, int]
_OPS = ("F", "F", "I", "I")
_F, _I = (0, 1), (2, 3)


def repeat_blocks(
    kind: str, blocks: Sequence[Block], num_microbatches: int
) -> Schedule:
    """Returns the schedule of a building block, given for each rank.

    Rank `r` of P holds stages `r` and `2P-1-r`. Of each rank's four times, no two may
    be equal modulo the period.

    Examples:
      >>> print(repeat_blocks("one", [(0, 1, 2, 3)], 1).to_csv(), end="")
      0F0,1F0,1I0,0I0,1W0,0W0
    """
    # Should nothing be idle before, all 2M of W come after the last block.
    end = max(itertools.chain(*blocks)) + (PERIOD + 2) * num_microbatches
    ranks = [_Rank(block, num_microbatches, end) for block in blocks]
    for rank in ranks:
        rank.fill_with_weights()
    _reorder(ranks)
    _drain(ranks)
    num_ranks = len(ranks)
    steps = tuple(
        rank.steps((r, 2 * num_ranks - 1 - r)) for r, rank in enumerate(ranks)
    )
    return Schedule(kind, num_ranks, 2 * num_ranks, num_microbatches, steps)


class _Rank:
    """When a rank runs its tasks.

    Attributes:
      times: of the four tasks of a block, [4][microbatches].
      weights: times of W, the n-th of which belongs to the n-th I.
      busy: [units] whether a task runs then.
    """

    def __init__(self, block: Block, num_microbatches: int, end: int):
        self.times = [[t + PERIOD * m for m in range(num_microbatches)] for t in block]
        self.weights: list[int] = []
        self.busy = bytearray(end)
        for time in itertools.chain(*self.times):
            self.busy[time] = True

    @property
    def last_forward(self) -> int:
        return max(self.times[kind][-1] for kind in _F)

    def fill_with_weights(self, earliest: int = 0) -> None:
        """Runs each W without a time in the first idle unit after its I."""
        made = sorted(itertools.chain(*(self.times[kind] for kind in _I)))
        unit = earliest
        for time in made[len(self.weights) :]:
            unit = self.busy.index(False, max(unit, time + 1))
            self.busy[unit] = True
            self.weights.append(unit)

    def alive(self) -> list[int]:
        """Returns the activations that the rank holds after each unit."""
        change = [0] * len(self.busy)
        for time in itertools.chain(*(self.times[kind] for kind in _F)):
            change[time] += 1
        for time in self.weights:
            change[time] -= 1
        return list(itertools.accumulate(change))

    def move(self, now: int, earliest: int) -> int:
        """Moves what runs at `now` to the first idle unit; returns that."""
        self.busy[now] = False
        unit = self.busy.index(False, min(earliest, now))
        self.busy[unit] = True
        return unit

    def steps(self, stages: tuple[int, int]) -> tuple[Step, ...]:
        """Returns the rank's tasks in order; `stages` are its first and second."""
        timed = [
            (time, Task(op, stages[kind in (1, 2)], m))
            for kind, op in enumerate(_OPS)
            for m, time in enumerate(self.times[kind])
        ]
        made = sorted(each for each in timed if each[1].op == "I")
        timed += [
            (time, task._replace(op="W"))
            for time, (_, task) in zip(self.weights, made, strict=True)
        ]
        return tuple((task,) for _, task in sorted(timed))


def _reorder(ranks: Sequence[_Rank]) -> None:
    """Moves tasks outside of the steady state as early as inputs and memory allow."""
    alive = [rank.alive() for rank in ranks]
    most = max(itertools.chain(*alive))
    returned, departed = ranks[0].times[_I[1]][0], ranks[0].times[_F[0]][-1]
    made: list[list[int]] = [[] for _ in ranks]  # I so far, by time
    tasks = [
        (time, r, kind, n)
        for r, rank in enumerate(ranks)
        for kind, times in enumerate((*rank.times, rank.weights))
        for n, time in enumerate(times)
    ]
    for now, r, kind, n in sorted(tasks):
        rank = ranks[r]
        if returned <= now <= departed:
            if kind in _I:
                bisect.insort(made[r], now)
            continue
        if kind == len(_OPS):
            needs = max(made[r][n], rank.weights[n - 1] if n else -1)
            rank.weights[n] = moved = rank.move(now, needs + 1)
            for unit in range(moved, now):
                alive[r][unit] -= 1
            continue
        earliest = _inputs(ranks, r, kind, n) + 1
        if kind in _F:
            unit = now
            while unit > earliest and alive[r][unit - 1] < most:
                unit -= 1
            earliest = unit
        rank.times[kind][n] = moved = rank.move(now, earliest)
        if kind in _F:
            for unit in range(moved, now):
                alive[r][unit] += 1
        else:
            bisect.insort(made[r], moved)


def _drain(ranks: Sequence[_Rank]) -> None:
    """Lets I run before W after each rank's last F."""
    last = [rank.last_forward for rank in ranks]
    for rank, end in zip(ranks, last, strict=True):
        kept = bisect.bisect(rank.weights, end)
        for time in rank.weights[kept:]:
            rank.busy[time] = False
        del rank.weights[kept:]
    tasks = [
        (time, r, kind, n)
        for r, rank in enumerate(ranks)
        for kind in _I
        for n, time in enumerate(rank.times[kind])
        if time > last[r]
    ]
    for now, r, kind, n in sorted(tasks):
        earliest = max(last[r], _inputs(ranks, r, kind, n)) + 1
        ranks[r].times[kind][n] = ranks[r].move(now, earliest)
    for rank, end in zip(ranks, last, strict=True):
        rank.fill_with_weights(end + 1)


def _inputs(ranks: Sequence[_Rank], r: int, kind: int, microbatch: int) -> int:
    """Returns when the last task runs that one must follow; -1: none.

    These are the task of the rank before it on the way down or back, that of its own
    rank and microbatch before it, and its own of the microbatch before.
    """
    sender = r + (1 if kind in (1, 3) else -1)
    needs = [-1]
    if 0 <= sender < len(ranks):
        needs.append(ranks[sender].times[kind][microbatch])
    if kind:
        needs.append(ranks[r].times[kind - 1][microbatch])
    if microbatch:
        needs.append(ranks[r].times[kind][microbatch - 1])
    return max(needs)
