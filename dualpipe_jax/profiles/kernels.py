"""Finds the kernels of each device, and their phases, in the events of a profile.

PyTorch's profiler marks kernels by category and links each to the call that launched
it: the annotation around that call names the phase. With jax.profiler, kernels are the
events on a device's streams (GPU) or those with an `hlo_op` (CPU): the named scopes in
`op_name` name the phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from dualpipe_jax.pictures import PAIR_NAMES, named_phase, phase
from dualpipe_jax.profiles.annotations import Annotation, Innermost
from dualpipe_jax.profiles.names import Names, Op
from dualpipe_jax.profiles.rules import Rule, is_container, is_kernel, is_launch


class KernelSpan(NamedTuple):
    """One kernel's run.

    Attributes:
      device: such as `"GPU 0"`.
      stream: the profiler's name of the queue that it ran in.
      name: the kernel's name.
      begin_us: when it began, in microseconds of the profile's clock.
      end_us: when it ended.
      is_comm: whether it communicates.
      phase: such as `"attn(F)"`; None if unknown.
      pair: number of the overlapped pair of a forward and a backward that launched it;
        None outside of pairs.
    """

    device: str
    stream: str
    name: str
    begin_us: float
    end_us: float
    is_comm: bool
    phase: str | None
    pair: int | None = None


class _Raw(NamedTuple):
    device: str
    stream: str
    name: str
    begin: float
    end: float
    is_comm: bool
    phase: str | None
    correlation: str  # of the launch; empty if there is none
    pid: str
    tid: str


class _Launch(NamedTuple):
    pid: str | None  # None: of several processes
    begin: float


class Collector:
    """Takes events one at a time and keeps what it needs to yield their spans."""

    def __init__(self, rule: Rule, names: Names):
        self.rule, self.names = rule, names
        self.processes: dict[str, str] = {}
        self.threads: dict[tuple[str, str], str] = {}
        self.kernels: list[_Raw] = []
        self.launches: dict[str, _Launch] = {}
        self.annotations: dict[str, list[Annotation]] = {}
        self.on_device: dict[tuple[str, str], list[Annotation]] = {}
        self.interned: dict[str, str] = {}

    def add(self, event: dict[str, Any]) -> None:
        if event.get("ph") == "M":
            self._name(event)
        elif event.get("ph") == "X":
            begin, duration = _number(event.get("ts")), _number(event.get("dur", 0))
            # No profiler writes other events.
            if begin is not None and duration is not None and duration >= 0:
                args = event.get("args")
                args = args if isinstance(args, dict) else {}
                self._complete(event, args, begin, begin + duration)

    def _name(self, event: dict[str, Any]) -> None:
        args = event.get("args")
        name = str(args.get("name", "")) if isinstance(args, dict) else ""
        if event.get("name") == "process_name":
            self.processes[str(event.get("pid"))] = name
        elif event.get("name") == "thread_name":
            self.threads[str(event.get("pid")), str(event.get("tid"))] = name

    def _complete(
        self, event: dict[str, Any], args: dict[str, Any], begin: float, end: float
    ) -> None:
        category, name = str(event.get("cat", "")), str(event.get("name", ""))
        pid, tid = str(event.get("pid")), str(event.get("tid"))
        if is_kernel(category):
            device = str(args.get("device", pid))
            where = f"GPU {device}" if device.isdecimal() else device
            stream = str(args.get("stream", tid))
            self._keep(where, stream, name, begin, end, args, pid, tid)
        elif is_launch(category):
            self._launched(_correlation(args), pid, begin)
        elif category == "user_annotation":
            if named_phase(name) or name.split(" ")[0] in PAIR_NAMES:
                found = self.annotations.setdefault(pid, [])
                found.append(Annotation(begin, end, name))
        elif category == "gpu_user_annotation":
            if named_phase(name):
                found = self.on_device.setdefault((pid, tid), [])
                found.append(Annotation(begin, end, name))
        elif self.processes.get(pid, "").startswith("/device:"):
            where = self.processes[pid].removeprefix("/device:").replace(":", " ")
            stream = self.threads.get((pid, tid), tid)
            self._keep(where, stream, name, begin, end, args, pid, tid)
        elif "hlo_op" in args:  # XLA:CPU, whose threads serve all devices
            where = f"CPU {args.get('device_ordinal', 0)}"
            self._keep(where, "thunks", name, begin, end, args, pid, tid)

    def _keep(self, device, stream, name, begin, end, args, pid, tid) -> None:
        op = self._op(name, args)
        if is_container(op.opcode or str(args.get("hlo_op", ""))):
            return
        names = [
            name,
            str(args.get("hlo_op", "")),
            op.opcode,
            str(args.get("kind", "")),
        ]
        # XLA may name a fusion after a collective that it reads.
        is_comm = op.opcode != "fusion" and (
            self.rule(" ".join(filter(None, dict.fromkeys(names))))
            or "Collective name" in args
        )
        found = named_phase(str(args.get("phase", ""))) or phase(op.op_name)
        # JSON can hold lone surrogates, which cannot be written to a file.
        name = name.encode("utf-8", "replace").decode("utf-8")
        name = self.interned.setdefault(name, name)
        self.kernels.append(
            _Raw(
                self.interned.setdefault(device, device),
                self.interned.setdefault(stream, stream),
                name,
                begin,
                end,
                is_comm,
                found,
                _correlation(args),
                pid,
                tid,
            )
        )

    def _launched(self, correlation: str, pid: str, begin: float) -> None:
        if not correlation:
            return
        known = self.launches.get(correlation)
        # Ranks merged into one file number their launches from 1 each, so it is unknown
        # which of them launched the kernel.
        shared = known is not None and known.pid != pid
        self.launches[correlation] = _Launch(None if shared else pid, begin)

    def _op(self, name: str, args: dict[str, Any]) -> Op:
        ops = self.names.get(str(args.get("hlo_module", "")), {})
        known = ops.get(str(args.get("hlo_op", name)))
        if known is not None and known.op_name:
            return known
        opcode = known.opcode if known is not None else ""
        for key in ("tf_op", "op_name", "long_name"):
            if "/" in str(args.get(key, "")):
                return Op(opcode, str(args[key]))
        return Op(opcode, "")

    def spans(self) -> Iterator[KernelSpan]:
        """Yields what was collected, in the order of the file."""
        phases, pairs = {}, {}
        for pid, some in self.annotations.items():
            phases[pid] = Innermost(a for a in some if named_phase(a.name))
            pairs[pid] = Innermost(a for a in some if not named_phase(a.name))
        on_device = {key: Innermost(some) for key, some in self.on_device.items()}
        for raw in _without_summaries(self.kernels):
            found, pair = raw.phase, None
            beside = on_device.get((raw.pid, raw.tid))
            if found is None and beside is not None:
                found = named_phase(beside.name_at(raw.begin) or "")
            launch = self.launches.get(raw.correlation)
            if launch is not None and launch.pid in phases:
                pair = pairs[launch.pid].at(launch.begin)
                if found is None:
                    found = named_phase(phases[launch.pid].name_at(launch.begin) or "")
            yield KernelSpan(*raw[:6], found, pair)


def _number(value: Any) -> float | None:
    """Returns a finite number as a float; None for anything else."""
    try:
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    return None


def _correlation(args: dict[str, Any]) -> str:
    """Returns the id that links a kernel to its launch; CUPTI writes 0 for none."""
    found = str(args.get("correlation", ""))
    return "" if found in ("0", "None") else found


def _without_summaries(kernels: list[_Raw]) -> Iterator[_Raw]:
    """Leaves out tracks that show a device's kernels again, by name or by step."""
    streams: dict[str, set[str]] = {}
    for raw in kernels:
        streams.setdefault(raw.device, set()).add(raw.stream)
    kept = {}
    for device, names in streams.items():
        real = {name for name in names if name.startswith("Stream #")}
        real = real or names & {"XLA Ops", "Async XLA Ops"}
        kept[device] = real or names
    return (raw for raw in kernels if raw.stream in kept[raw.device])
