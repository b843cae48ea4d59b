"""The estimated timeline of a computation as a Chrome trace."""

from __future__ import annotations

from typing import Any

from dualpipe_jax.overlap.phases import last_part, phase, phase_of
from dualpipe_jax.overlap.program import Program
from dualpipe_jax.overlap.timeline import Compute


def trace(program: Program, computation: str, title: str) -> dict[str, Any]:
    """One run of a computation: a track for compute, and one for each link."""
    done = program.timeline(computation)
    names = {
        event.name: event
        for event in program.events(computation)
        if isinstance(event, Compute)
    }
    found = program.collectives(computation)
    tracks = {"": ("Compute", 0), "nvlink": ("NVLink", 1), "network": ("Network", 2)}
    tracks["local"] = ("Local copies", 3)
    used = {span.queue for span in done.spans} | {""}
    events: list[dict[str, Any]] = [_meta("process_name", 0, title)]
    for queue, (label, track) in tracks.items():
        if queue in used:
            events.append(_meta("thread_name", track, label))
            events.append(
                {
                    "name": "thread_sort_index",
                    "ph": "M",
                    "pid": 0,
                    "tid": track,
                    "args": {"sort_index": track},
                }
            )
    for span in done.spans:
        args: dict[str, Any] = {"instruction": span.name}
        if span.queue:
            label = phase_of(program, computation, span.name)
            kind, traffic = found[span.name][0].kind, found[span.name][1]
            args |= {
                "kind": kind,
                "bytes": traffic.num_bytes,
                "exposed_us": done.exposed[span.name] * 1e6,
            }
        else:
            work, op_name = names[span.name].work, names[span.name].op_name
            label = phase(op_name) or last_part(op_name) or span.name
            kind = "gemm" if work.gemms else "kernel"
            args |= {"flops": work.flops, "bytes": work.num_bytes, "op_name": op_name}
        events.append(
            {
                "name": label,
                "cat": kind,
                "ph": "X",
                "pid": 0,
                "tid": tracks[span.queue][1],
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
                "args": args,
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(name: str, track: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 0, "tid": track, "args": {"name": value}}
