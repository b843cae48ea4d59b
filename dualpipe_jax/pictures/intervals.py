"""Sets of moments, as sorted lists of intervals that do not touch."""

from __future__ import annotations

import math
from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """When at least one of them runs.

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
    """When both run; each as `union` returns it.

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
    """How long they last, one after another."""
    return math.fsum(end - begin for begin, end in intervals)
