"""What a profile says: how busy the devices were, and what communication was hidden."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualpipe_jax.pictures import PARTS, PASSES, pass_of, union
from dualpipe_jax.profiles.events import read_events
from dualpipe_jax.profiles.kernels import Collector, Span
from dualpipe_jax.profiles.names import read_names
from dualpipe_jax.profiles.records import (
    Device,
    Kernel,
    Phase,
    Stream,
    device_of,
    extents,
    kernels_of,
    natural,
    phase_of,
    streams_of,
    times,
)
from dualpipe_jax.profiles.rules import Rule, communication_rule
from dualpipe_jax.schedules import Costs
from eplb_jax import lookup

_ORDER = [f"{part}({step})" for step in PASSES for part in PARTS]


@dataclasses.dataclass(frozen=True, repr=False)
class TraceReport:
    """A profile, read. In a notebook it shows itself as tables.

    Durations of several devices are means, fractions are of their sums; `devices` has
    each one's own.

    Attributes:
      title: what it was read from.
      spans: every kernel's run, by begin.

    Examples:
      >>> report = TraceReport("two kernels", (
      ...     Span("GPU 0", "7", "gemm", 0.0, 8.0, False, "mlp(F)"),
      ...     Span("GPU 0", "9", "ncclAllToAll", 6.0, 10.0, True, "combine(F)"),
      ... ))
      >>> report.span_us, report.compute_busy, report.comm_hidden
      (10.0, 0.8, 0.5)
      >>> report.phases["combine(F)"].hidden_us
      2.0
    """

    title: str
    spans: tuple[Span, ...]

    def __post_init__(self):
        if not self.spans:
            raise ValueError(
                f"{self.title} has no kernel that ran on a device; record with the "
                "profiler's GPU activities (torch.profiler), or around a step that "
                "runs until its results are there (jax.profiler)."
            )

    @functools.cached_property
    def devices(self) -> tuple[Device, ...]:
        """Each device's own figures, by name."""
        return tuple(
            device_of(name, self._by_device[name])
            for name in sorted(self._by_device, key=natural)
        )

    @functools.cached_property
    def _by_device(self) -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            found.setdefault(span.device, []).append(span)
        return found

    def _sum(self, name: str) -> float:
        return sum(getattr(device, name) for device in self.devices)

    @property
    def span_us(self) -> float:
        """From the first kernel's begin to the last one's end, in microseconds."""
        return self._sum("span_us") / len(self.devices)

    @property
    def compute_us(self) -> float:
        """Time in which a kernel computes."""
        return self._sum("compute_us") / len(self.devices)

    @property
    def comm_us(self) -> float:
        """Time in which a kernel communicates."""
        return self._sum("comm_us") / len(self.devices)

    @property
    def exposed_us(self) -> float:
        """Time in which a kernel communicates and none computes."""
        return self.comm_us - self._sum("hidden_us") / len(self.devices)

    @property
    def comm_hidden(self) -> float:
        """The part of communication under which something computes; 1 without any."""
        comm = self._sum("comm_us")
        return self._sum("hidden_us") / comm if comm else 1.0

    @property
    def compute_busy(self) -> float:
        """The part of the span in which something computes."""
        span = self._sum("span_us")
        return self._sum("compute_us") / span if span else 0.0

    @functools.cached_property
    def streams(self) -> tuple[Stream, ...]:
        """The queues that kernels ran in, the busiest of each device first."""
        return streams_of(self.spans)

    @functools.cached_property
    def phases(self) -> dict[str, Phase]:
        """By name, forward first; kernels of no phase are in none."""
        by_phase: dict[str, list[Span]] = {}
        for span in self.spans:
            if span.phase is not None:
                by_phase.setdefault(span.phase, []).append(span)
        known = [name for name in _ORDER if name in by_phase]
        computing = {
            device: union(times(s for s in spans if not s.is_comm))
            for device, spans in self._by_device.items()
        }
        return {name: phase_of(name, by_phase[name], computing) for name in known}

    @functools.cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """By name, the dearest first."""
        return kernels_of(self.spans)

    def costs(self, chunks: int | None = None) -> Costs:
        """What F, I, W and F&B take, in milliseconds, for `simulate`.

        F, I and W are the durations of the kernels of the phases `(F)`, `(B)` and
        `(W)`, added up: what the pass would take alone, nothing hidden. FB is how long
        an overlapped pair takes, if the profile marks pairs (annotations `1F1B`, as in
        DeepSeek's, or `F&B`).

        Args:
          chunks: how many forwards, and as many backwards, each device ran in the
            profile. Default: the number of its pairs that are marked, or 1.

        Raises:
          ValueError: `chunks` is not positive, or no phase is told.
        """
        _check(chunks)
        if not self.phases:
            raise ValueError(
                f"{self.title} tells no phase of its kernels; name them with "
                "annotations such as attn(F), or with jax.named_scope."
            )
        pairs = extents(self.spans)
        each_device = chunks or len(pairs) / len(self.devices) or 1
        alone: dict[str, float] = dict.fromkeys(PASSES, 0.0)
        for found in self.phases.values():
            alone[pass_of(found.name) or ""] += found.compute_us + found.comm_us
        each = 1e-3 / each_device / len(self.devices)
        return Costs(
            F=alone["F"] * each,
            I=alone["B"] * each,
            W=alone["W"] * each,
            FB=1e-3 * sum(pairs) / len(pairs) if pairs else None,
        )

    def as_json(self, chunks: int | None = None) -> dict[str, Any]:
        """Everything but the spans, as plain data; `chunks` as for `costs`."""
        _check(chunks)
        costs = dataclasses.asdict(self.costs(chunks)) if self.phases else None
        return {
            "title": self.title,
            "span_us": self.span_us,
            "compute_us": self.compute_us,
            "comm_us": self.comm_us,
            "comm_hidden": self.comm_hidden,
            "compute_busy": self.compute_busy,
            "phases": {
                name: dataclasses.asdict(each) for name, each in self.phases.items()
            },
            "costs_ms": costs,
            "devices": [dataclasses.asdict(each) for each in self.devices],
            "streams": [dataclasses.asdict(each) for each in self.streams],
            "kernels": [dataclasses.asdict(each) for each in self.kernels],
        }

    def __repr__(self) -> str:
        return (
            f"TraceReport({self.title}, {len(self.spans)} kernels: "
            f"{self.span_us / 1e3:.1f} ms, compute busy {self.compute_busy:.1%}, "
            f"{self.comm_hidden:.1%} of {self.comm_us / 1e3:.1f} ms communication "
            "hidden)"
        )

    def text(self, chunks: int | None = None) -> str:
        """Headline figures and tables; `chunks` as for `costs`."""
        return lookup.find("dualpipe_jax.profiles.render:text")(self, chunks)

    def __str__(self) -> str:
        return self.text()

    _repr_html_ = lookup.method("dualpipe_jax.profiles.render:html")


def read_trace(
    path: str | os.PathLike[str],
    communication: str | Sequence[str] | Rule | None = None,
) -> TraceReport:
    """Reads a profile: a Chrome or Perfetto trace in JSON.

    Args:
      path: a .json or .json.gz, of torch.profiler's `export_chrome_trace`, of
        jax.profiler, or one that this library writes; or a folder, whose newest
        jax.profiler trace is taken. Events are read one at a time: what is kept is
        their kernels, so that a file of several hundred megabytes is no matter.
      communication: regular expressions for the names of further kernels that
        communicate, beside `dualpipe_jax.profiles.COMMUNICATION`; or a function of a
        name in their place.

    Raises:
      ValueError: it is empty, cut off, no trace, or has no kernels; or an expression is
        none.
      OSError: it cannot be read.

    Examples:
      >>> import json, tempfile
      >>> file = Path(tempfile.mkdtemp()) / "trace.json"
      >>> kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 5, "dur": 2}
      >>> _ = file.write_text(json.dumps({"traceEvents": [kernel]}))
      >>> read_trace(file).kernels
      (Kernel(name='gemm', is_comm=False, count=1, total_us=2.0),)
    """
    rule = communication_rule(communication)
    file = find_trace(Path(path))
    collector = Collector(rule, read_names(file))
    for event in read_events(file):
        collector.add(event)
    spans = sorted(collector.spans(), key=lambda span: (span.begin_us, span.end_us))
    return TraceReport(file.name, tuple(spans))


def _check(chunks: int | None) -> None:
    if chunks is not None and chunks < 1:
        raise ValueError(f"{chunks=} must be positive; count each device's F.")


def find_trace(path: Path) -> Path:
    """The file itself, or the newest trace of jax.profiler below a folder.

    Of several hosts that wrote at the same time it is the last by name.
    """
    if not path.is_dir():
        return path
    found = sorted(
        path.rglob("*.trace.json.gz"), key=lambda file: (file.parent.name, file.name)
    )
    if not found:
        raise ValueError(
            f"path={str(path)!r} is a folder without a *.trace.json.gz, as "
            "jax.profiler writes it; name a trace, .json or .json.gz."
        )
    return found[-1]
