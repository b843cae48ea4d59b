"""Ticks and permutes: the order of a schedule in one SPMD program.

All ranks of an SPMD program issue the same permutes in the same order, so each message
needs a position in an order that all ranks share. That order is a sequence of ticks:
the distinct starting times of the schedule's steps, simulated at structural costs.
Between two ticks are the permutes of the messages exchanged there.

Steps and tasks are numbered as in `Schedule.arrays`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from dualpipe_jax.schedules import Costs, Schedule, simulate_steps

# The shape of a schedule: all units of work equal, no communication. Ticks derived from
# real costs would break up the steady state.
STRUCTURAL = Costs(F=1.0, I=1.0, W=1.0)

# Times of one chunk in DeepSeek's published training trace (milliseconds); they choose
# a boundary where structural costs leave several.
TYPICAL = Costs(F=97.0, I=104.0, W=35.0, B=139.0, FB=129.0)

# Boundaries that are compared at once.
_CHUNK = 2**20

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Clock:
    """The ticks of a schedule: in which tick each rank starts each of its steps.

    Attributes:
      schedule: whose ticks.
      times: [ticks] when each begins.
      steps: [ticks, num_ranks] the step that each rank starts, or -1.
      tick: [steps] of each step.
      spans: [2, steps] start and end of each step, at structural costs.
      typical_spans: the same at typical costs.
    """

    schedule: Schedule
    times: np.ndarray
    steps: np.ndarray
    tick: np.ndarray
    spans: np.ndarray
    typical_spans: np.ndarray

    @classmethod
    def of(cls, schedule: Schedule) -> Clock:
        """Simulates a schedule."""
        spans = np.array(simulate_steps(schedule, STRUCTURAL))
        times, tick = np.unique(spans[0], return_inverse=True)
        steps = np.full((len(times), schedule.num_ranks), -1)
        steps[tick, schedule.arrays.rank] = np.arange(len(tick))
        typical = np.array(simulate_steps(schedule, TYPICAL))
        return cls(schedule, times, steps, tick, spans, typical)

    def delay(self, step: int, tick: int) -> None:
        """Lets a step start, and so end, later than simulated."""
        rank = self.schedule.arrays.rank[step]
        self.steps[self.tick[step], rank] = -1
        self.steps[tick, rank] = step
        self.spans[:, step] += self.times[tick] - self.spans[0, step]
        self.tick[step] = tick

    def kinds_at(self, kinds: np.ndarray) -> np.ndarray:
        """[ticks, num_ranks] kind of the step that each rank starts, or -1.

        Args:
          kinds: [steps] of each step.
        """
        return np.where(self.steps < 0, -1, kinds[self.steps]).astype(np.int32)


def uniform_kinds(kinds_at: np.ndarray) -> np.ndarray:
    """[ticks] the kind of step that every rank starts; -1: not all start the same."""
    first = kinds_at[:, 0]
    return np.where((kinds_at == first[:, None]).all(axis=1), first, -1)


def align_loops(clock: Clock, kinds: np.ndarray, is_pair: np.ndarray) -> None:
    """Delays steps, at no cost, where this makes the common steady state longer.

    The ranks at the ends enter the steady state early, and then wait. Starting such a
    step in the tick in which all others start theirs does not reorder anything that it
    waits for.

    Args:
      clock: whose steps are delayed.
      kinds: [steps] of each step.
      is_pair: [kinds] whether it is a pair.
    """
    kinds_at = clock.kinds_at(kinds)
    uniform = uniform_kinds(kinds_at)
    # Of the ticks between, only those before a steady one may become steady.
    steady = [kind >= 0 and bool(is_pair[kind]) for kind in uniform.tolist()]
    full: list[bool] = np.all(kinds_at >= 0, axis=1).tolist()
    consumers = _Consumers(clock.schedule)
    for tick in range(len(steady) - 2, -1, -1):
        if full[tick] or not steady[tick + 1]:
            continue
        here = set(kinds[clock.steps[tick][clock.steps[tick] >= 0]].tolist())
        if len(here) != 1 or not is_pair[min(here)]:
            continue
        moves = _moves(clock, kinds, consumers, tick, min(here))
        for step in moves:
            full[clock.tick[step]] = steady[clock.tick[step]] = False
            clock.delay(step, tick)
        full[tick] = steady[tick] = bool(moves)


def _moves(clock: Clock, kinds, consumers: _Consumers, tick: int, wanted) -> list[int]:
    """Steps of the wanted kind that make a tick steady; none if they cannot."""
    first, moves = clock.schedule.arrays.first, []
    for rank in np.flatnonzero(clock.steps[tick] < 0):
        own = slice(first[rank], first[rank + 1])
        step = first[rank] + np.searchsorted(clock.tick[own], tick) - 1
        if step < first[rank] or kinds[step] != wanted:
            return []
        start, end = clock.spans[:, step]
        following = consumers.of(step)
        if step + 1 < own.stop:
            following = np.append(following, step + 1)
        if (clock.times[tick] + end - start > clock.spans[0, following]).any():
            return []
        moves.append(int(step))
    return moves


class _Consumers:
    """Which steps of other stages need a step's results."""

    def __init__(self, schedule: Schedule):
        arrays = schedule.arrays
        passes = np.flatnonzero(arrays.passed >= 0)
        order = np.argsort(arrays.passed[passes], kind="stable")
        self.made = arrays.passed[passes][order]
        self.used = arrays.step[passes][order]

    def of(self, step: int) -> np.ndarray:
        return self.used[slice(*np.searchsorted(self.made, [step, step + 1]))]


class Messages(NamedTuple):
    """Results that go from rank to rank: [messages], in the order of the permutes.

    Attributes:
      task: that gets each.
      sender: step that makes it.
      receiver: step that the task is in.
      tick: after whose steps it is exchanged.
      permute: which of the tick's permutes exchanges it.
    """

    task: np.ndarray
    sender: np.ndarray
    receiver: np.ndarray
    tick: np.ndarray
    permute: np.ndarray


def place_messages(clock: Clock) -> tuple[Messages, tuple[tuple[Pairs, ...], ...]]:
    """Chooses the permute in which each message between ranks is exchanged.

    A permute makes its two ends wait for each other. Of the boundaries between producer
    and consumer, takes the one with the least waiting, and among equals the last: at
    structural costs first, then at typical ones.

    Returns:
      The messages, and for each tick the (source, target) pairs of the permutes that
      follow its steps.
    """
    arrays = clock.schedule.arrays
    is_other = arrays.rank[arrays.passed] != arrays.rank[arrays.step]
    task = np.flatnonzero((arrays.passed >= 0) & is_other)
    sender, receiver = arrays.passed[task], arrays.step[task]
    tick = _boundaries(clock, sender, receiver) - 1
    source, target = arrays.rank[sender], arrays.rank[receiver]
    op = arrays.op[task] != 0  # results are called F, or I, in this order
    stage = arrays.stage[task] + np.where(op, 1, -1)
    order = np.lexsort((arrays.microbatch[task], stage, op, source, tick))
    permute, permutes = _split_rounds(
        tick[order], source[order], target[order], len(clock.times)
    )
    by_permute = np.lexsort((permute, tick[order]))
    order, permute = order[by_permute], permute[by_permute]
    messages = Messages(
        task[order], sender[order], receiver[order], tick[order], permute
    )
    return messages, permutes


def _boundaries(clock: Clock, sender: np.ndarray, receiver: np.ndarray) -> np.ndarray:
    """[messages] the tick before whose steps each is exchanged."""
    arrays = clock.schedule.arrays
    low, high = clock.tick[sender] + 1, clock.tick[receiver]
    found = high.copy()
    ends = arrays.rank[sender], arrays.rank[receiver]
    waits = [_Waiting(clock, spans) for spans in (clock.spans, clock.typical_spans)]
    several = np.flatnonzero(low < high)
    totals = np.cumsum(high[several] - low[several] + 1)
    for part in np.split(several, np.flatnonzero(np.diff(totals // _CHUNK)) + 1):
        if not len(part):
            continue
        sizes = high[part] - low[part] + 1
        begin = np.cumsum(sizes) - sizes
        own = np.repeat(np.arange(len(part)), sizes)
        tick = np.arange(len(own)) - begin[own] + low[part][own]
        source, target = (rank[part][own] for rank in ends)
        is_best = np.ones(len(own), bool)
        for waiting in waits:
            wait = np.where(is_best, waiting.at(source, target, tick), np.inf)
            is_best &= wait == np.minimum.reduceat(wait, begin)[own]
        found[part] = np.maximum.reduceat(np.where(is_best, tick, -1), begin)
    return found


class _Waiting:
    """How long a permute before a tick delays the next steps of its two ranks.

    Times are sums of integers, so that equal ones are equal as floats too.
    """

    def __init__(self, clock: Clock, spans: np.ndarray):
        first = clock.schedule.arrays.first
        starts_here = clock.steps >= 0
        done = np.cumsum(starts_here, axis=0) - starts_here  # [ticks, num_ranks]
        step = first[:-1] + done
        before = np.append(spans[1], 0.0)[step - 1]
        self.ready = np.where(done > 0, before, 0.0)
        after = np.append(spans[0], np.inf)[step]
        self.next = np.where(step < first[1:], after, np.inf)

    def at(self, source: np.ndarray, target: np.ndarray, tick: np.ndarray):
        """[permutes] the sum over both ranks."""
        ready = np.maximum(self.ready[tick, source], self.ready[tick, target])
        waits = (np.maximum(ready - self.next[tick, r], 0) for r in (source, target))
        return sum(waits)


def _split_rounds(
    tick: np.ndarray, source: np.ndarray, target: np.ndarray, num_ticks: int
) -> tuple[np.ndarray, tuple[tuple[Pairs, ...], ...]]:
    """Groups the messages of each tick into permutes.

    In a permute each rank sends at most one message and receives at most one.

    Args:
      tick: [messages] sorted.
      source: [messages] rank that sends.
      target: [messages] rank that receives.
      num_ticks: of the schedule.

    Returns:
      The permute of each message, and the permutes of each tick.
    """
    # A steady state repeats a few patterns.
    pairs = np.stack([source, target], axis=1).astype(np.int32)
    known: dict[bytes, tuple[list[int], tuple[Pairs, ...]]] = {}
    permutes: list[tuple[Pairs, ...]] = [()] * num_ticks
    permute: list[int] = []
    ticks, starts = np.unique(tick, return_index=True)
    stops = [*starts.tolist(), len(tick)][1:]
    for where, start, stop in zip(ticks.tolist(), starts.tolist(), stops, strict=True):
        key = pairs[start:stop].tobytes()
        if key not in known:
            known[key] = _first_fit(pairs[start:stop].tolist())
        rounds, permutes[where] = known[key]
        permute += rounds
    return np.array(permute, np.int64), tuple(permutes)


def _first_fit(pairs: list[list[int]]) -> tuple[list[int], tuple[Pairs, ...]]:
    rounds: list[list[tuple[int, int]]] = []
    chosen = []
    for source, target in pairs:
        fits = (
            k
            for k, group in enumerate(rounds)
            if all(source != s and target != t for s, t in group)
        )
        k = next(fits, len(rounds))
        rounds[k:] = rounds[k:] or [[]]
        rounds[k].append((source, target))
        chosen.append(k)
    return chosen, tuple(tuple(sorted(group)) for group in rounds)
