"""The estimated timeline of a computation as a Chrome trace."""

from __future__ import annotations

from typing import Any

from dualpipe_jax.gpu.overlap.phases import last_part, phase_of
from dualpipe_jax.gpu.overlap.program import Program
from dualpipe_jax.gpu.overlap.timeline import Compute
from dualpipe_jax.pictures import ChromeTrace, phase

_TRACKS = {
    "": "Compute",
    "nvlink": "NVLink",
    "network": "Network",
    "local": "Local copies",
}


def trace(program: Program, computation: str, title: str) -> ChromeTrace:
    """One run of a computation: a track for compute, and one for each link."""
    done = program.timeline(computation)
    names = {
        event.name: event
        for event in program.events(computation)
        if isinstance(event, Compute)
    }
    found = program.collectives(computation)
    made = ChromeTrace()
    device = made.device(title)
    used = {span.queue for span in done.spans} | {""}
    streams = {
        queue: made.stream(device, label)
        for queue, label in _TRACKS.items()
        if queue in used
    }
    for span in done.spans:
        args: dict[str, Any] = {"instruction": span.name}
        if span.queue:
            label = phase_of(program, computation, span.name)
            args |= {
                "kind": found[span.name][0].kind,
                "bytes": found[span.name][1].num_bytes,
                "exposed_us": done.exposed[span.name] * 1e6,
            }
        else:
            work, op_name = names[span.name].work, names[span.name].op_name
            label = phase(op_name) or last_part(op_name) or span.name
            args |= {
                "kind": "gemm" if work.gemms else "kernel",
                "flops": work.flops,
                "bytes": work.num_bytes,
                "op_name": op_name,
            }
        made.span(
            device,
            streams[span.queue],
            label,
            span.begin * 1e6,
            (span.end - span.begin) * 1e6,
            {"phase": label, **args},
        )
    return made
