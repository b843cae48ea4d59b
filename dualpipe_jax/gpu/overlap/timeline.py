"""Simulates one run of a computation's instructions, in their order.

Compute is one stream. Communication runs beside it, with one queue per kind of link
(NVLink, network, the GPU's own memory) that is served in the order of the starts. A
start is issued when compute reaches it; a done stalls compute until its collective has
finished.

A stall is charged to the collectives that its queue works on while it lasts. So all
stalls are charged, and no collective is charged with more than its own time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dualpipe_jax.gpu.overlap.work import KernelWork


@dataclasses.dataclass(frozen=True)
class Compute:
    """A kernel, or a loop or branch as a whole.

    Attributes:
      name: of the instruction.
      work: what it does and how long that takes.
      op_name: where in the program it comes from; empty if unknown.
    """

    name: str
    work: KernelWork
    op_name: str = ""


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a collective.

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
    """The end of a collective: compute waits for it.

    Attributes:
      start: the name of its `Start`.
    """

    start: str


Event = Compute | Start | Done


@dataclasses.dataclass(frozen=True)
class HloSpan:
    """When something ran, in seconds from the start of the computation.

    Attributes:
      name: of the instruction.
      begin: seconds.
      end: seconds.
      queue: the link; empty for compute.
    """

    name: str
    begin: float
    end: float
    queue: str = ""


@dataclasses.dataclass(frozen=True)
class HloTimeline:
    """When one run's events took place.

    Attributes:
      makespan: compute plus stalls.
      compute: work of all `Compute` events.
      spans: of compute and of collectives.
      stalls: begin and end of each wait, named after the collective waited for.
      exposed: seconds of stalls charged to each collective.
      under: the work between start and done of each collective.
    """

    makespan: float
    compute: KernelWork
    spans: tuple[HloSpan, ...]
    stalls: tuple[HloSpan, ...]
    exposed: dict[str, float]
    under: dict[str, KernelWork]


def run(events: Sequence[Event]) -> HloTimeline:
    """Simulates the events of one computation, in order.

    A start without a done is waited for at the end.

    Examples:
      >>> gemm = Compute("gemm", KernelWork(seconds=3.0))
      >>> start, done = Start("a2a", 5.0, "nvlink"), Done("a2a")
      >>> run([start, gemm, done]).makespan, run([start, gemm, done]).exposed
      (5.0, {'a2a': 2.0})
    """
    now, total = 0.0, KernelWork()
    free: dict[str, float] = {}
    running: dict[str, HloSpan] = {}
    before: dict[str, KernelWork] = {}
    collectives: dict[str, HloSpan] = {}
    spans: list[HloSpan] = []
    stalls: list[HloSpan] = []
    under: dict[str, KernelWork] = {}
    for event in [*events, *(Done(e.name) for e in events if isinstance(e, Start))]:
        if isinstance(event, Compute):
            spans.append(HloSpan(event.name, now, now + event.work.seconds))
            now += event.work.seconds
            total += event.work
        elif isinstance(event, Start):
            begin = max(now, free.get(event.queue, 0.0))
            span = HloSpan(event.name, begin, begin + event.seconds, event.queue)
            free[event.queue] = span.end
            running[event.name] = collectives[event.name] = span
            before[event.name] = total
            spans.append(span)
        elif event.start in running:
            span = running.pop(event.start)
            under[event.start] = total + before[event.start] * -1.0
            if span.end > now:
                stalls.append(HloSpan(event.start, now, span.end, span.queue))
                now = span.end
    exposed = {name: _charged(span, stalls) for name, span in collectives.items()}
    return HloTimeline(now, total, tuple(spans), tuple(stalls), exposed, under)


def _charged(span: HloSpan, stalls: Sequence[HloSpan]) -> float:
    waited = sum(
        max(0.0, min(span.end, stall.end) - max(span.begin, stall.begin))
        for stall in stalls
        if stall.queue == span.queue
    )
    # Rounding must not make it longer than the collective.
    return min(waited, span.end - span.begin)
