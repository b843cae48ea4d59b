"""Steady states: runs of ticks whose steps and permutes repeat."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_LONG = 4


class Loop(NamedTuple):
    """A steady state: from tick `start`, `period` ticks are repeated `trips` times.

    In each tick every rank runs a step of the same kind and takes part in the same
    permutes, so the loop's body needs no branch.
    """

    start: int
    period: int
    trips: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.trips


def find_loops(
    uniform: np.ndarray,
    is_pair: np.ndarray,
    permutes: tuple[tuple[tuple[tuple[int, int], ...], ...], ...],
) -> tuple[Loop, ...]:
    """Finds the steady states.

    Args:
      uniform: [ticks] the kind of step that all ranks start, or -1.
      is_pair: [kinds] whether it is a pair.
      permutes: for each tick, the (source, target) pairs of the permutes after it.

    Returns:
      Loops that do not overlap. Overlapped pairs get a separate body even for one
      trip; single tasks only if they fill at least `_LONG` ticks.
    """
    known: dict[object, int] = {}
    pattern = np.array([known.setdefault(pairs, len(known)) for pairs in permutes])
    ends = {period: _ends(uniform, pattern, period) for period in (1, 2)}
    kinds, pairs = uniform.tolist(), (is_pair[uniform] & (uniform >= 0)).tolist()
    loops: list[Loop] = []
    tick = 1  # A loop is started by the tick before it.
    while tick < len(kinds):
        if kinds[tick] < 0:
            tick += 1
            continue
        trips = {period: (ends[period][tick] - tick) // period for period in (1, 2)}
        loop = max(
            (Loop(tick, p, trips[p]) for p in (1, 2)), key=lambda loop: loop.stop
        )
        is_long = loop.stop - loop.start >= (
            2 if all(pairs[tick : tick + loop.period]) else _LONG
        )
        # One body is enough for an earlier loop of this period and kind.
        is_known = any(
            other.period == loop.period and kinds[other.start] == kinds[tick]
            for other in loops
        )
        if loop.trips and is_long and not is_known:
            loops.append(loop)
            tick = loop.stop
        else:
            tick += 1
    return tuple(loops)


def _ends(uniform: np.ndarray, pattern: np.ndarray, period: int) -> list[int]:
    """For each tick, where what begins there with so many ticks stops to repeat."""
    num_ticks = len(uniform)
    ticks = np.arange(num_ticks + 1)
    # From each tick on, the next one that is not uniform, and the next unlike the one
    # that is a period before it.
    is_broken = np.append(uniform < 0, True)
    is_other = np.ones(num_ticks + 1, bool)
    is_other[period:num_ticks] = (uniform[period:] != uniform[:-period]) | (
        pattern[period:] != pattern[:-period]
    )
    broken, other = (
        np.minimum.accumulate(np.where(found, ticks, num_ticks)[::-1])[::-1]
        for found in (is_broken, is_other)
    )
    fresh = np.minimum(ticks[:-1] + period, num_ticks)
    ends = np.minimum(broken[:-1], other[fresh])
    if period == 2:
        # Two alike are a period of one.
        second = np.minimum(ticks[:-1] + 1, num_ticks - 1)
        is_one = (ends - ticks[:-1] >= 2) & (uniform == uniform[second])
        ends = np.where(is_one, ticks[:-1], ends)
    return ends.tolist()
