"""Writes Chrome traces, for Perfetto and for `read_trace`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class ChromeTrace:
    """Collects a trace's events: a process per device, a track per stream.

    Examples:
      >>> trace = ChromeTrace()
      >>> rank = trace.device("Rank 0")
      >>> stream = trace.stream(rank, "Compute")
      >>> trace.span(rank, stream, "attn(F)", 0, 5, {"phase": "attn(F)"})
      >>> [event["name"] for event in trace.as_json()["traceEvents"]][-1]
      'attn(F)'
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._names: dict[tuple[int, int], str] = {}
        self._devices: list[str] = []

    def device(self, name: str) -> int:
        """Adds a device below the others; returns its number."""
        number = len(self._devices)
        self._devices.append(name)
        self._describe("process_name", number, 0, {"name": name})
        self._describe("process_sort_index", number, 0, {"sort_index": number})
        return number

    def stream(self, device: int, name: str) -> int:
        """Adds a track to a device, below its others; returns its number."""
        number = sum(key[0] == device for key in self._names)
        self._names[device, number] = name
        self._describe("thread_name", device, number, {"name": name})
        self._describe("thread_sort_index", device, number, {"sort_index": number})
        return number

    def span(
        self,
        device: int,
        stream: int,
        name: str,
        begin_us: float,
        duration_us: float,
        args: Mapping[str, Any],
        *,
        ran: bool = True,
    ) -> None:
        """Adds a kernel that ran or, with `ran=False`, an annotation.

        `read_trace` reads `phase` from a kernel's `args`, and `kind` for a collective.
        """
        if ran:
            where = self._devices[device], self._names[device, stream]
            args = {**dict(zip(("device", "stream"), where, strict=True)), **args}
        self._events.append(
            {
                "name": name,
                "cat": "kernel" if ran else "user_annotation",
                "ph": "X",
                "pid": device,
                "tid": stream,
                "ts": begin_us,
                "dur": duration_us,
                "args": dict(args),
            }
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the trace as plain data."""
        return {"traceEvents": list(self._events), "displayTimeUnit": "ms"}

    def dumps(self) -> str:
        """Returns the trace as text."""
        return json.dumps(self.as_json()) + "\n"

    def _describe(self, name: str, pid: int, tid: int, args: dict) -> None:
        event = {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}
        self._events.append(event)
