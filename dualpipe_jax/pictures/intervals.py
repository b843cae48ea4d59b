"""Sets of points in time, as sorted lists of disjoint intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns when at least one of the intervals runs, as disjoint intervals.

    Examples:
      >>> union([(5, 6), (0, 2), (1, 3)])
      [(0, 3), (5, 6)]
    """
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Returns when both run; each is as `union` returns it.

    Examples:
      >>> intersection([(0, 3), (5, 9)], [(2, 6), (8, 12)])
      [(2, 3), (5, 6), (8, 9)]
    """
    both, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            both.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both


def length(intervals: Iterable[Interval]) -> float:
    """Returns the sum of their lengths."""
    return math.fsum(end - begin for begin, end in intervals)
