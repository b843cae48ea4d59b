"""Assigns values to buffer slots by interval colouring."""

from __future__ import annotations

import heapq

import numpy as np


def assign_slots(
    start: np.ndarray, end: np.ndarray, rank: np.ndarray
) -> tuple[np.ndarray, int]:
    """Gives every value a slot so that no two of a rank share one while both are alive.

    Taking the lowest free slot in order of start needs as many slots as the most values
    alive at once, which is the minimum (interval graphs are perfect).

    Args:
      start: [values] int, when each is written.
      end: [values] int, when it is read for the last time; still alive then.
      rank: [values] int, where it is.

    Returns:
      The slot of each value, and the number of slots (the maximum over ranks).

    Examples:
      >>> slots, count = assign_slots(*np.array([[0, 2, 4], [3, 5, 6], [0, 0, 0]]))
      >>> slots.tolist(), count
      ([0, 1, 0], 2)
    """
    order = np.lexsort((end, start, rank))
    cuts = np.flatnonzero(np.diff(rank[order])) + 1
    slots, count = np.zeros(len(start), np.int32), 0
    for own in np.split(order, cuts):
        slots[own], needed = _assign(start[own].tolist(), end[own].tolist())
        count = max(count, needed)
    return slots, count


def _assign(starts: list[int], ends: list[int]) -> tuple[list[int], int]:
    """Assigns the slots of one rank, whose values are sorted by start and end."""
    free: list[int] = []
    busy: list[int] = []  # end * most + slot: faster to compare than a pair
    slots, count, most = [], 0, len(starts) + 1
    pop, push = heapq.heappop, heapq.heappush
    for start, end in zip(starts, ends, strict=True):
        while busy and busy[0] < start * most:
            push(free, pop(busy) % most)
        if free:
            slot = pop(free)
        else:
            slot, count = count, count + 1
        slots.append(slot)
        push(busy, end * most + slot)
    return slots, count
