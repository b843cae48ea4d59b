"""The figures of a profile: per device, stream, phase and kernel."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from dualpipe_jax.pictures import Interval, intersection, length, union
from dualpipe_jax.profiles.kernels import KernelSpan


@dataclasses.dataclass(frozen=True)
class Device:
    """One device of a profile.

    Attributes:
      name: such as `"GPU 0"`.
      span_us: from its first kernel's begin to its last one's end.
      compute_us: time in which at least one kernel computes.
      comm_us: time in which at least one kernel communicates.
      hidden_us: time in which both happen.
    """

    name: str
    span_us: float
    compute_us: float
    comm_us: float
    hidden_us: float


@dataclasses.dataclass(frozen=True)
class Stream:
    """One queue of a device.

    Attributes:
      device: the device's name.
      name: the profiler's name of the queue.
      num_kernels: number of kernels that ran in it.
      busy_us: time in which at least one of them runs.
      comm_us: time in which at least one of them communicates.
    """

    device: str
    name: str
    num_kernels: int
    busy_us: float
    comm_us: float


@dataclasses.dataclass(frozen=True)
class Phase:
    """The kernels of one phase, on all devices together.

    Attributes:
      name: such as `"dispatch(F)"`; see `dualpipe_jax.pictures.phases`.
      num_kernels: number of kernels.
      compute_us: total duration of those that compute.
      comm_us: total duration of those that communicate.
      hidden_us: the part of it in which the device computes, in any phase.
    """

    name: str
    num_kernels: int
    compute_us: float
    comm_us: float
    hidden_us: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of the kernels that share a name, on all devices together.

    Attributes:
      name: the kernel's name.
      is_comm: whether it communicates.
      count: number of runs.
      total_us: total duration.
    """

    name: str
    is_comm: bool
    count: int
    total_us: float


def natural(name: str) -> list[tuple[str, int]]:
    """Returns a sorting key that puts GPU 10 behind GPU 2."""
    parts = re.findall(r"(\D*)(\d*)", name)
    return [(text, int(number or 0)) for text, number in parts]


def times(spans: Iterable[KernelSpan]) -> Iterable[Interval]:
    """Returns when each kernel ran."""
    return ((span.begin_us, span.end_us) for span in spans)


def device_of(name: str, spans: Sequence[KernelSpan]) -> Device:
    """Returns a device's figures, from all kernels that ran on it."""
    compute = union(times(s for s in spans if not s.is_comm))
    comm = union(times(s for s in spans if s.is_comm))
    return Device(
        name,
        max(s.end_us for s in spans) - min(s.begin_us for s in spans),
        length(compute),
        length(comm),
        length(intersection(compute, comm)),
    )


def phase_of(
    name: str, spans: Sequence[KernelSpan], computing: dict[str, list[Interval]]
) -> Phase:
    """Returns a phase's figures; `computing` is when each device computes (a union)."""
    comm: dict[str, list[Interval]] = {}
    for span in spans:
        if span.is_comm:
            comm.setdefault(span.device, []).append((span.begin_us, span.end_us))
    return Phase(
        name,
        len(spans),
        sum(s.end_us - s.begin_us for s in spans if not s.is_comm),
        sum(end - begin for some in comm.values() for begin, end in some),
        sum(
            length(intersection(union(some), computing[device]))
            for device, some in comm.items()
        ),
    )


def extents(spans: Iterable[KernelSpan]) -> list[float]:
    """Returns how long each overlapped pair took on its device, in microseconds."""
    first: dict[tuple[str, int], float] = {}
    last: dict[tuple[str, int], float] = {}
    for span in spans:
        if span.pair is not None:
            key = span.device, span.pair
            first[key] = min(first.get(key, span.begin_us), span.begin_us)
            last[key] = max(last.get(key, span.end_us), span.end_us)
    return [last[key] - first[key] for key in first]


def streams_of(spans: Iterable[KernelSpan]) -> tuple[Stream, ...]:
    """Returns the queues that kernels ran in, the busiest of each device first."""
    found: dict[tuple[str, str], list[KernelSpan]] = {}
    for span in spans:
        found.setdefault((span.device, span.stream), []).append(span)
    streams = [
        Stream(
            device,
            name,
            len(some),
            length(union(times(some))),
            length(union(times(s for s in some if s.is_comm))),
        )
        for (device, name), some in found.items()
    ]
    return tuple(sorted(streams, key=lambda s: (natural(s.device), -s.busy_us)))


def kernels_of(spans: Iterable[KernelSpan]) -> tuple[Kernel, ...]:
    """Returns the kernels by name, the most expensive first."""
    totals: dict[tuple[str, bool], float] = collections.defaultdict(float)
    counts: collections.Counter[tuple[str, bool]] = collections.Counter()
    for span in spans:
        totals[span.name, span.is_comm] += span.end_us - span.begin_us
        counts[span.name, span.is_comm] += 1
    by_time = sorted(totals.items(), key=lambda item: -item[1])
    return tuple(Kernel(*key, counts[key], us) for key, us in by_time)
