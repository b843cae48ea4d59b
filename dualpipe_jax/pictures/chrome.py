"""A timeline as a Chrome trace: each rank's steps, and the phases inside them."""

from __future__ import annotations

from dualpipe_jax.pictures import picture as _picture
from dualpipe_jax.pictures.phase_layout import COMMUNICATION, COMPUTE, layout
from dualpipe_jax.pictures.trace_writer import ChromeTrace
from dualpipe_jax.schedules import Schedule, Task, Timeline, predecessors, result_of


def trace(timeline: Timeline, microseconds_per_unit: float) -> ChromeTrace:
    """Makes the trace that `show.chrome_trace` writes."""
    p2p = timeline.costs.p2p
    senders = _senders(timeline.schedule) if p2p else set()
    made = ChromeTrace()
    for rank, spans in enumerate(timeline.spans):
        device = made.device(f"Rank {rank}")
        steps = made.stream(device, "Steps")
        streams = {name: made.stream(device, name) for name in (COMPUTE, COMMUNICATION)}
        for step, start, end in spans:
            begin = start * microseconds_per_unit
            duration = (end - start) * microseconds_per_unit
            made.span(
                device,
                steps,
                " & ".join(f"{task.op} {task.microbatch}" for task in step),
                begin,
                duration,
                {str(task): _picture.describe(timeline, task) for task in step},
                ran=False,
            )
            for placed in layout(tuple(task.op for task in step)):
                communicates = placed.stream == COMMUNICATION
                made.span(
                    device,
                    streams[placed.stream],
                    placed.name,
                    begin + placed.begin * duration,
                    (placed.end - placed.begin) * duration,
                    {
                        "phase": placed.name,
                        **({"kind": "all-to-all"} if communicates else {}),
                    },
                )
            if not senders.isdisjoint(map(result_of, step)):
                made.span(
                    device,
                    streams[COMMUNICATION],
                    "PP",
                    begin + duration,
                    p2p * microseconds_per_unit,
                    {"kind": "collective-permute"},
                )
    return made


def _senders(schedule: Schedule) -> set[Task]:
    """Returns the results that another rank needs."""
    home = {
        result_of(task): rank
        for rank, steps in enumerate(schedule.steps)
        for step in steps
        for task in step
    }
    return {
        need
        for task, rank in home.items()
        for need in predecessors(task, schedule)
        if home[need] != rank
    }
