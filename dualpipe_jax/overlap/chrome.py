"""Phases in DeepSeek's names, and the estimated timeline as a Chrome trace.

A phase is read from `op_name`, the path of `jax.named_scope`s and transformations:
the innermost scope called `attn`, `dispatch`, `mlp` or `combine` (or a synonym) says
which; `transpose(...)` makes it B; a scope called `W` makes it W.
"""

from __future__ import annotations

import collections
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpipe_jax.overlap.hlo import Computation, Instruction
    from dualpipe_jax.overlap.program import Program

SCOPES = {
    "attn": "attn",
    "attention": "attn",
    "mla": "attn",
    "dispatch": "dispatch",
    "mlp": "mlp",
    "moe": "mlp",
    "ffn": "mlp",
    "experts": "mlp",
    "combine": "combine",
}
_WEIGHTS = ("W", "wgrad")


def phase(op_name: str) -> str | None:
    """DeepSeek's name of the phase that an operation belongs to; None if untold.

    Examples:
      >>> phase("jit(step)/while/body/transpose(jvp(mlp))/dot_general")
      'mlp(B)'
      >>> phase("jit(step)/while/body/W/transpose(jvp(mlp))/dot_general")
      'mlp(W)'
    """
    words = re.split(r"[/()]+", op_name)
    known = [SCOPES[word] for word in words if word in SCOPES]
    if not known:
        return None
    if any(word in _WEIGHTS for word in words):
        return f"{known[-1]}(W)"
    return f"{known[-1]}({'B' if 'transpose(' in op_name else 'F'})"


def phase_of(program: Program, computation: str, start: str) -> str:
    """The phase of a collective, from its name, or its neighbours' names.

    XLA drops the names of what it wraps in asynchronous calls: then what makes the
    operands and what takes the result vote.
    """
    found, _ = program.collectives(computation)[start]
    own = phase(found.op.op_name)
    where = program.module[computation]
    if own is None and start in where.by_name and "all-to-all" in found.kind:
        own = _vote(where, where.by_name[start])
    return own or _short(found.op.op_name) or found.kind


def _vote(where: Computation, op: Instruction) -> str | None:
    names = [*op.operands]
    for done in where.users.get(op.name, []):
        names += [user.name for user in where.users.get(done.name, [])]
    votes: collections.Counter[str] = collections.Counter()
    for name in names:
        made = where.source(name) or where.by_name.get(name)
        while made is not None and not phase(made.op_name) and made.operands[:1]:
            if made.opcode not in ("get-tuple-element", "copy", "bitcast", "reshape"):
                break
            made = where.by_name.get(made.operands[0])
        named = phase(made.op_name) if made is not None else None
        if named and named.startswith(("dispatch", "combine")):
            votes[named] += 1
    return votes.most_common(1)[0][0] if votes else None


def _short(op_name: str) -> str:
    return op_name.rpartition("/")[2]


def trace(program: Program, computation: str, title: str) -> dict[str, Any]:
    """One run of a computation: a track for compute, and one for each link."""
    done = program.timeline(computation)
    names = {
        event.name: event
        for event in program.events(computation)
        if hasattr(event, "work")
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
            label = phase(op_name) or _short(op_name) or span.name
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
