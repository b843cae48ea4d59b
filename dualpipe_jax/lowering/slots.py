"""Assigns values to buffer slots by interval colouring."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A value's lifetime: written at `start`, read for the last time at `end`."""

    start: int
    end: int
    rank: int


def assign_slots(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """Gives every interval a slot so that overlapping intervals of a rank never share.

    Taking the lowest free slot in order of start needs as many slots as the most values
    alive at once, which is the minimum (interval graphs are perfect).

    Args:
      intervals: lifetimes of values, both ends included.

    Returns:
      The slot of each interval, and the number of slots (the maximum over ranks).

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
