"""Ticks, permutes and steady states: the order of a schedule in one SPMD program.

All ranks of an SPMD program issue the same permutes in the same order, so each message
needs a position in an order that all ranks share. That order is a sequence of ticks:
the distinct starting times of the schedule's steps, simulated at structural costs.
Between two ticks are the permutes of the messages exchanged there.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

from dualpipe_jax.schedules import (
    Costs,
    Schedule,
    Step,
    Task,
    Timeline,
    predecessors,
    result_of,
    simulate,
)

# The shape of a schedule: all units of work equal, no communication. Ticks derived from
# real costs would break up the steady state.
STRUCTURAL = Costs(F=1.0, I=1.0, W=1.0)

# Times of one chunk in DeepSeek's published training trace (milliseconds); they choose
# a boundary where structural costs leave several.
TYPICAL = Costs(F=97.0, I=104.0, W=35.0, B=139.0, FB=129.0)

Kind = tuple[tuple[str, int], ...]

_LONG = 4


class Place(NamedTuple):
    """Where a step runs: on `rank`, at `position` in its order, in `tick`."""

    rank: int
    position: int
    tick: int


class Message(NamedTuple):
    """The result of `task`, from the step at `sender` to the step at `receiver`.

    `boundary` is the tick before whose steps the message is exchanged.
    """

    task: Task
    sender: Place
    receiver: Place
    boundary: int


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


class Clock:
    """The ticks of a schedule: in which tick each rank starts each of its steps."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        timeline = simulate(schedule, STRUCTURAL)
        self.typical_spans = _spans(simulate(schedule, TYPICAL))
        self.times = sorted(
            {start for spans in timeline.spans for _, start, _ in spans}
        )
        index = {time: tick for tick, time in enumerate(self.times)}
        self.ticks = [
            [index[start] for _, start, _ in spans] for spans in timeline.spans
        ]
        # A step moved by `delay` starts, and so ends, later than simulated.
        self.spans = _spans(timeline)

    def position_at(self, rank: int, tick: int) -> int | None:
        """Returns the position of the step that `rank` starts in `tick`, or None."""
        position = bisect.bisect_left(self.ticks[rank], tick)
        ticks = self.ticks[rank]
        return position if position < len(ticks) and ticks[position] == tick else None

    def delay(self, rank: int, position: int, tick: int) -> None:
        start, end = self.spans[rank][position]
        later = self.times[tick]
        self.ticks[rank][position] = tick
        self.spans[rank][position] = (later, later + end - start)


def producers(schedule: Schedule) -> dict[Task, tuple[int, int]]:
    """Maps each task's result (B's under its I) to its step: (rank, position)."""
    return {
        result_of(task): (rank, position)
        for rank, position, step in schedule
        for task in step
    }


def links(schedule: Schedule) -> list[tuple[Task, tuple[int, int], tuple[int, int]]]:
    """Returns all values passed between stages: (task, producer, consumer)."""
    made = producers(schedule)
    return [
        (need, made[need], (rank, position))
        for rank, position, step in schedule
        for task in step
        for need in predecessors(task, schedule)
        if need.stage != task.stage
    ]


def align_loops(clock: Clock, kinds: list[list[Kind]]) -> None:
    """Delays steps, at no cost, where this makes the common steady state longer.

    The ranks at the ends enter the steady state early, and then wait. Starting such a
    step in the tick in which all others start theirs does not reorder anything that it
    waits for.
    """
    consumers: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for _, producer, consumer in links(clock.schedule):
        consumers.setdefault(producer, []).append(consumer)
    for tick in range(len(clock.times) - 2, -1, -1):
        # The kind shared by the ranks that start a step in this tick already.
        wanted = _wanted(clock, kinds, tick)
        moves = []
        for rank in range(clock.schedule.num_ranks):
            if wanted is None or clock.position_at(rank, tick) is not None:
                continue
            position = bisect.bisect_left(clock.ticks[rank], tick) - 1
            if position < 0:
                break
            start, end = clock.spans[rank][position]
            ends = clock.times[tick] + end - start
            following = [
                clock.spans[r][p][0] for r, p in consumers.get((rank, position), ())
            ]
            following += [s for s, _ in clock.spans[rank][position + 1 : position + 2]]
            if kinds[rank][position] != wanted or any(ends > s for s in following):
                break
            moves.append((rank, position))
        else:
            for rank, position in moves:
                clock.delay(rank, position, tick)


def _wanted(clock: Clock, kinds: list[list[Kind]], tick: int) -> Kind | None:
    """Returns the kind of pair of all steps in `tick`, if the next tick is steady."""
    following = uniform_kind(clock, kinds, tick + 1)
    here = {
        kinds[rank][position]
        for rank in range(clock.schedule.num_ranks)
        if (position := clock.position_at(rank, tick)) is not None
    }
    if following is None or len(following) != 2 or len(here) != 1:
        return None
    (kind,) = here
    return kind if len(kind) == 2 else None


def uniform_kind(clock: Clock, kinds: list[list[Kind]], tick: int) -> Kind | None:
    """Returns the kind of step in `tick` if every rank starts the same kind."""
    found = set()
    for rank in range(clock.schedule.num_ranks):
        position = clock.position_at(rank, tick)
        if position is None:
            return None
        found.add(kinds[rank][position])
    return found.pop() if len(found) == 1 else None


def place_messages(clock: Clock) -> list[Message]:
    """Chooses the boundary at which each message between ranks is exchanged.

    A permute makes its two ends wait for each other. Of the boundaries between producer
    and consumer, takes the one with the least waiting, and among equals the last: at
    structural costs first, then at typical ones.
    """
    messages = []
    for task, (source, p), (target, c) in links(clock.schedule):
        if source == target:
            continue
        sender = Place(source, p, clock.ticks[source][p])
        receiver = Place(target, c, clock.ticks[target][c])
        boundary = min(
            range(sender.tick + 1, receiver.tick + 1),
            key=lambda tick: (
                _waiting(clock, clock.spans, source, target, tick),
                _waiting(clock, clock.typical_spans, source, target, tick),
                -tick,
            ),
        )
        messages.append(Message(task, sender, receiver, boundary))
    return sorted(messages, key=lambda m: (m.boundary, m.sender.rank, m.task))


def _spans(timeline: Timeline) -> list[list[tuple[float, float]]]:
    return [[(s, e) for _, s, e in spans] for spans in timeline.spans]


def _waiting(clock: Clock, spans, source: int, target: int, tick: int) -> float:
    """Returns how long a permute at `tick` delays the next steps of both ranks."""
    done, following = [], []
    for rank in (source, target):
        position = bisect.bisect_left(clock.ticks[rank], tick)
        done.append(spans[rank][position - 1][1] if position else 0.0)
        ahead = spans[rank][position : position + 1]
        following.append(ahead[0][0] if ahead else float("inf"))
    ready = max(done)
    # Rounded, so that float noise does not decide before the next key.
    return round(sum(max(0.0, ready - time) for time in following), 6)


def split_rounds(messages: list[Message]) -> list[list[Message]]:
    """Groups the messages of one boundary into permutes.

    In a permute each rank sends at most one message and receives at most one.
    """
    rounds: list[list[Message]] = []
    for message in messages:
        for group in rounds:
            if all(
                message.sender.rank != other.sender.rank
                and message.receiver.rank != other.receiver.rank
                for other in group
            ):
                group.append(message)
                break
        else:
            rounds.append([message])
    return rounds


def find_loops(
    clock: Clock,
    kinds: list[list[Kind]],
    permutes: list[tuple[tuple[tuple[int, int], ...], ...]],
) -> tuple[Loop, ...]:
    """Finds the steady states: runs of ticks whose steps and permutes repeat.

    Args:
      clock: the ticks.
      kinds: the kind of each rank's steps.
      permutes: for each tick, the (source, target) pairs of the permutes after it.

    Returns:
      Loops that do not overlap. Overlapped pairs get a separate body even for one
      trip; single tasks only if they fill at least `_LONG` ticks.
    """
    uniform = [uniform_kind(clock, kinds, tick) for tick in range(len(clock.times))]
    loops: list[Loop] = []
    tick = 1  # A loop is started by the tick before it.
    while tick < len(uniform):
        loop = max(
            (_loop_at(uniform, permutes, tick, period) for period in (1, 2)),
            key=lambda loop: loop.stop,
        )
        pairs = all(len(kind or ()) == 2 for kind in uniform[tick : tick + loop.period])
        least = 2 if pairs else _LONG
        enough = loop.trips and loop.stop - loop.start >= least
        if enough and not _known(loop, loops, uniform, permutes):
            loops.append(loop)
            tick = loop.stop
        else:
            tick += 1
    return tuple(loops)


def _loop_at(uniform, permutes, start: int, period: int) -> Loop:
    stop = start
    while stop < len(uniform) and uniform[stop] is not None:
        fresh = stop - start < period
        if not fresh and (uniform[stop], permutes[stop]) != (
            uniform[stop - period],
            permutes[stop - period],
        ):
            break
        stop += 1
    if period == 2 and stop - start >= 2 and uniform[start] == uniform[start + 1]:
        stop = start
    return Loop(start, period, (stop - start) // period)


def _known(loop: Loop, loops: list[Loop], uniform, permutes) -> bool:
    """Whether an earlier loop has this period and kind, so that one body is enough."""
    return any(
        other.period == loop.period and uniform[other.start] == uniform[loop.start]
        for other in loops
    )


def step_kind(step: Step, chunk_of: dict[int, int]) -> Kind:
    """Returns the kind of a step: its (op, chunk) pairs."""
    return tuple((task.op, chunk_of[task.stage]) for task in step)
