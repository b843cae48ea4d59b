"""The estimated timeline of a computation as a Chrome trace."""

from __future__ import annotations

from typing import Any

from dualpipe_jax.gpu.overlap.phases import last_part, phase_of
from dualpipe_jax.gpu.overlap.program import HloProgram
from dualpipe_jax.gpu.overlap.timeline import Compute
from dualpipe_jax.pictures import ChromeTrace, phase

_TRACKS = {
    "": "Compute",
    "nvlink": "NVLink",
    "network": "Network",
    "local": "Local copies",
}


def trace(program: HloProgram, computation: str, title: str) -> ChromeTrace:
    """Returns one run of a computation: a compute track, and a track per link."""
    timeline = program.timeline(computation)
    compute = {
        event.name: event
        for event in program.events(computation)
        if isinstance(event, Compute)
    }
    collectives = program.collectives(computation)
    written = ChromeTrace()
    device = written.device(title)
    used = {span.queue for span in timeline.spans} | {""}
    streams = {
        queue: written.stream(device, label)
        for queue, label in _TRACKS.items()
        if queue in used
    }
    for span in timeline.spans:
        args: dict[str, Any] = {"instruction": span.name}
        if span.queue:
            collective, traffic = collectives[span.name]
            label = phase_of(program, computation, span.name)
            args |= {
                "kind": collective.kind,
                "bytes": traffic.num_bytes,
                "exposed_us": timeline.exposed[span.name] * 1e6,
            }
        else:
            work, op_name = compute[span.name].work, compute[span.name].op_name
            label = phase(op_name) or last_part(op_name) or span.name
            args |= {
                "kind": "gemm" if work.gemms else "kernel",
                "flops": work.flops,
                "bytes": work.num_bytes,
                "op_name": op_name,
            }
        written.span(
            device,
            streams[span.queue],
            label,
            span.begin * 1e6,
            (span.end - span.begin) * 1e6,
            {"phase": label, **args},
        )
    return written
