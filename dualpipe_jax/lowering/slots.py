"""Which buffer slot holds which value: interval colouring."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A value's life: written at `start`, read for the last time at `end`."""

    start: int
    end: int
    rank: int


def assign_slots(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """Gives every interval a slot so that no two of a rank share one at any time.

    Taking the lowest free slot in order of start needs no more slots than values
    are ever alive at once, which is the least possible (interval graphs are
    perfect).

    Args:
      intervals: lives of values, both ends included.

    Returns:
      The slot of each interval, and the number of slots (the most of any rank).

    Examples:
      >>> assign_slots([Interval(0, 3, 0), Interval(2, 5, 0), Interval(4, 6, 0)])
      ([0, 1, 0], 2)
    """
    slots = [0] * len(intervals)
    count = 0
    for rank in {interval.rank for interval in intervals}:
        mine = (i for i, interval in enumerate(intervals) if interval.rank == rank)
        count = max(count, _assign_rank(mine, intervals, slots))
    return slots, count


def _assign_rank(
    mine: Iterable[int], intervals: Sequence[Interval], slots: list[int]
) -> int:
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    count = 0
    for i in sorted(mine, key=lambda i: intervals[i]):
        while busy and busy[0][0] < intervals[i].start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, count)
            count += 1
        slots[i] = heapq.heappop(free)
        heapq.heappush(busy, (intervals[i].end, slots[i]))
    return count
