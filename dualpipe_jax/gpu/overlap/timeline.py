"""Runs one computation's instructions in their order, on paper.

Compute is one stream. Communication runs beside it, on one queue for each kind of link
(NVLink, network, the GPU's own memory), each in the order of the starts. A start is
issued when compute reaches it; a done stalls compute until its collective is through.

A stall is charged to what the queue is busy with while it lasts, so that what one
collective is charged with is never more than its time, and all stalls are charged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dualpipe_jax.gpu.overlap.work import Work


@dataclasses.dataclass(frozen=True)
class Compute:
    """A kernel, or a loop or branch as a whole.

    Attributes:
      name: of the instruction.
      work: what it does and how long that takes.
      op_name: where in the program it comes from; empty if nobody knows.
    """

    name: str
    work: Work
    op_name: str = ""


@dataclasses.dataclass(frozen=True)
class Start:
    """A collective is issued.

    Attributes:
      name: of the instruction; `Done` refers to it.
      seconds: on its link.
      queue: which link.
    """

    name: str
    seconds: float
    queue: str


@dataclasses.dataclass(frozen=True)
class Done:
    """Compute goes on when the collective that was started is through.

    Attributes:
      start: the name of its `Start`.
    """

    start: str


Event = Compute | Start | Done


@dataclasses.dataclass(frozen=True)
class Span:
    """When something ran, in seconds from the computation's begin.

    Attributes:
      name: of the instruction.
      begin: in seconds.
      end: in seconds.
      queue: the link; empty for compute.
    """

    name: str
    begin: float
    end: float
    queue: str = ""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What became of the events.

    Attributes:
      makespan: compute plus stalls.
      compute: work of all `Compute` events.
      spans: of compute and of collectives.
      stalls: begin and end of each wait, with the name of what was waited for.
      exposed: seconds of stalls charged to each collective.
      under: the work between start and done of each collective.
    """

    makespan: float
    compute: Work
    spans: tuple[Span, ...]
    stalls: tuple[Span, ...]
    exposed: dict[str, float]
    under: dict[str, Work]


def run(events: Sequence[Event]) -> Timeline:
    """Simulates the events of one computation, in order.

    A start without its done is waited for at the end.

    Examples:
      >>> gemm = Compute("gemm", Work(seconds=3.0))
      >>> start, done = Start("a2a", 5.0, "nvlink"), Done("a2a")
      >>> run([start, gemm, done]).makespan, run([start, gemm, done]).exposed
      (5.0, {'a2a': 2.0})
    """
    now, total = 0.0, Work()
    free: dict[str, float] = {}
    flying: dict[str, Span] = {}
    before: dict[str, Work] = {}
    through: dict[str, Span] = {}
    spans: list[Span] = []
    stalls: list[Span] = []
    under: dict[str, Work] = {}
    for event in [*events, *(Done(e.name) for e in events if isinstance(e, Start))]:
        if isinstance(event, Compute):
            spans.append(Span(event.name, now, now + event.work.seconds))
            now += event.work.seconds
            total += event.work
        elif isinstance(event, Start):
            begin = max(now, free.get(event.queue, 0.0))
            span = Span(event.name, begin, begin + event.seconds, event.queue)
            free[event.queue] = span.end
            flying[event.name] = through[event.name] = span
            before[event.name] = total
            spans.append(span)
        elif event.start in flying:
            span = flying.pop(event.start)
            under[event.start] = total + before[event.start] * -1.0
            if span.end > now:
                stalls.append(Span(event.start, now, span.end, span.queue))
                now = span.end
    exposed = {name: _charged(span, stalls) for name, span in through.items()}
    return Timeline(now, total, tuple(spans), tuple(stalls), exposed, under)


def _charged(span: Span, stalls: Sequence[Span]) -> float:
    waited = sum(
        max(0.0, min(span.end, stall.end) - max(span.begin, stall.begin))
        for stall in stalls
        if stall.queue == span.queue
    )
    # Rounding must not make it longer than it is.
    return min(waited, span.end - span.begin)
