"""The report on a profile: how busy devices were, how much communication was hidden."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from dualpipe_jax.pictures import PARTS, PASSES, pass_of, union
from dualpipe_jax.profiles.kernels import KernelSpan
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
from dualpipe_jax.schedules import Costs
from eplb_jax import lookup

_ORDER = [f"{part}({step})" for step in PASSES for part in PARTS]


@dataclasses.dataclass(frozen=True, repr=False)
class TraceReport:
    """The kernels of a profile and their figures. A notebook shows it as tables.

    Durations of several devices are means, and fractions are of their sums; `devices`
    has the figures of each.

    Attributes:
      title: the name of the file.
      spans: every kernel's run, by begin.

    Examples:
      >>> report = TraceReport("two kernels", (
      ...     KernelSpan("GPU 0", "7", "gemm", 0.0, 8.0, False, "mlp(F)"),
      ...     KernelSpan("GPU 0", "9", "ncclAllToAll", 6.0, 10.0, True, "combine(F)"),
      ... ))
      >>> report.span_us, report.compute_busy, report.comm_hidden
      (10.0, 0.8, 0.5)
      >>> report.phases["combine(F)"].hidden_us
      2.0
    """

    title: str
    spans: tuple[KernelSpan, ...]

    def __post_init__(self):
        if not self.spans:
            raise ValueError(
                f"{self.title} has no kernel that ran on a device; record GPU "
                "activities (torch.profiler), or wait for a step's results inside the "
                "profile (jax.profiler)."
            )

    @functools.cached_property
    def devices(self) -> tuple[Device, ...]:
        """The figures of each device, by name."""
        return tuple(
            device_of(name, self._by_device[name])
            for name in sorted(self._by_device, key=natural)
        )

    @functools.cached_property
    def _by_device(self) -> dict[str, list[KernelSpan]]:
        found: dict[str, list[KernelSpan]] = {}
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
        """Time in which a kernel computes, in microseconds."""
        return self._sum("compute_us") / len(self.devices)

    @property
    def comm_us(self) -> float:
        """Time in which a kernel communicates, in microseconds."""
        return self._sum("comm_us") / len(self.devices)

    @property
    def exposed_us(self) -> float:
        """Time in which a kernel communicates and none computes, in microseconds."""
        return self.comm_us - self._sum("hidden_us") / len(self.devices)

    @property
    def comm_hidden(self) -> float:
        """Fraction of the communication that runs under compute; 1 without any."""
        comm = self._sum("comm_us")
        return self._sum("hidden_us") / comm if comm else 1.0

    @property
    def compute_busy(self) -> float:
        """Fraction of the span in which a kernel computes."""
        span = self._sum("span_us")
        return self._sum("compute_us") / span if span else 0.0

    @functools.cached_property
    def streams(self) -> tuple[Stream, ...]:
        """The queues that kernels ran in, the busiest of each device first."""
        return streams_of(self.spans)

    @functools.cached_property
    def phases(self) -> dict[str, Phase]:
        """The phases by name, forward first; kernels without a phase are left out."""
        by_phase: dict[str, list[KernelSpan]] = {}
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
        """The kernels by name, the most expensive first."""
        return kernels_of(self.spans)

    def costs(self, chunks: int | None = None) -> Costs:
        """Returns the costs of F, I, W and F&B for `simulate`, in milliseconds.

        F, I and W are the total durations of the kernels of the phases `(F)`, `(B)` and
        `(W)`: the time of each pass alone, with nothing hidden. FB is how long an
        overlapped pair takes, if the profile marks pairs (annotations `1F1B`, as in
        DeepSeek's profile, or `F&B`).

        Args:
          chunks: number of forwards, and of backwards, that each device ran in the
            profile. Default: the number of pairs that the profile marks, or 1.

        Raises:
          ValueError: `chunks` is not positive, or no kernel has a phase.
        """
        _check(chunks)
        if not self.phases:
            raise ValueError(
                f"{self.title} has no phases; name them with annotations such as "
                "attn(F), or with jax.named_scope."
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
        """Returns all but the spans as plain data; `chunks` as for `costs`."""
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
        """Returns headline figures and tables; `chunks` as for `costs`."""
        return lookup.find("dualpipe_jax.profiles.render:text")(self, chunks)

    def __str__(self) -> str:
        return self.text()

    _repr_html_ = lookup.method("dualpipe_jax.profiles.render:html")


def _check(chunks: int | None) -> None:
    if chunks is not None and chunks < 1:
        raise ValueError(f"{chunks=} must be positive: the F that each device ran.")
