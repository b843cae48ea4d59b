"""Converts one run of a computation to the spans that a figure draws."""

from __future__ import annotations

from dualpipe_jax.gpu.overlap.phases import last_part, phase, phase_of
from dualpipe_jax.gpu.overlap.program import HloProgram
from dualpipe_jax.gpu.overlap.timeline import Compute
from dualpipe_jax.pictures import TrackSpan

TRACKS = {"": "Compute", "nvlink": "NVLink", "network": "Network", "local": "Copies"}


def spans_of(program: HloProgram, computation: str) -> tuple[TrackSpan, ...]:
    """Returns the spans of compute and of each link, in microseconds."""
    op_names = {
        event.name: event.op_name
        for event in program.events(computation)
        if isinstance(event, Compute)
    }
    spans = []
    for span in program.timeline(computation).spans:
        if span.queue:
            name = span.name
            label = phase_of(program, computation, span.name)
        else:
            op_name = op_names[span.name]
            name = last_part(op_name) or span.name
            label = phase(op_name) or ""
        begin, end = span.begin * 1e6, span.end * 1e6
        track = TRACKS[span.queue]
        spans.append(TrackSpan(track, name, begin, end, bool(span.queue), label))
    return tuple(spans)
