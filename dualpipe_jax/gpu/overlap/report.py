"""Which part of a compiled program's communication runs under compute."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from dualpipe_jax.gpu.overlap import chrome, hlo
from dualpipe_jax.gpu.overlap.assumptions import assumptions
from dualpipe_jax.gpu.overlap.links import Links
from dualpipe_jax.gpu.overlap.program import GUARD, Program
from dualpipe_jax.gpu.overlap.records import CollectiveReport, LoopReport, read_loop
from dualpipe_jax.gpu.overlap.spans import spans_of
from dualpipe_jax.gpu.overlap.timeline import Compute, Done, Timeline
from dualpipe_jax.gpu.overlap.work import Roofline
from dualpipe_jax.gpu.topology import GPUS, Gpu
from dualpipe_jax.pictures import TrackSpan, timeline
from eplb_jax import lookup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RENDER = "dualpipe_jax.gpu.overlap.render"


class OverlapReport:
    """What `overlap_report` found.

    Attributes:
      module: the module's name.
      gpu: whose figures the times are reckoned with.
      gpus_per_node: devices of one node.
      efficiency: part of the GPU's peaks that kernels are taken to reach.
      loops: computations with collectives, those with the most communication in all
        their runs first.
      assumptions: what was guessed, in words.
    """

    def __init__(
        self,
        program: Program,
        gpu: Gpu,
        gpus_per_node: int,
        efficiency: float,
        unknown: set[str],
    ):
        self._program = program
        self.module: str = program.module.name
        self.gpu, self.gpus_per_node, self.efficiency = gpu, gpus_per_node, efficiency
        loops = [
            read_loop(program, name)
            for name in program.paths
            if program.collectives(name)
        ]
        self.loops: tuple[LoopReport, ...] = tuple(
            sorted(loops, key=lambda each: -each.communication_s * _weight(each))
        )
        self.assumptions: tuple[str, ...] = assumptions(
            program,
            gpu,
            gpus_per_node,
            efficiency,
            {each.kind for each in self.collectives},
            unknown,
        )

    @property
    def collectives(self) -> tuple[CollectiveReport, ...]:
        """Those of all loops."""
        return tuple(each for loop in self.loops for each in loop.collectives)

    @functools.cached_property
    def steady_state(self) -> LoopReport:
        """The loop whose own collectives take the most time in one run of its body.

        Or the guard inside a loop, where ranks differ in what they run in each trip.
        Branches and the entry are not meant, unless there is nothing else.

        Raises:
          ValueError: the module has no collectives.
        """
        if not self.loops:
            raise ValueError(
                f"the module {self.module} has no collectives, and so no steady state; "
                "was it compiled for more than one device?"
            )
        loops = [loop for loop in self.loops if _is_repeated(loop)]
        return max(
            loops or self.loops,
            key=lambda loop: (loop.communication_s, loop.kind == "while"),
        )

    def loop(self, name: str) -> LoopReport:
        """The loop, branch or entry of this name, or whose name begins so.

        Raises:
          ValueError: there is none with collectives, or several begin so.
        """
        exact = [loop for loop in self.loops if loop.name == name]
        found = exact or [loop for loop in self.loops if loop.name.startswith(name)]
        if len(found) != 1:
            names = [loop.name for loop in found or self.loops]
            raise ValueError(
                f"{name=} is the begin of {len(found)} computations with collectives; "
                f"name one of {', '.join(names) or 'none'}."
            )
        return found[0]

    def costs(self) -> dict[str, float]:
        """Seconds of each kernel and collective, by the name of its instruction.

        Loops and branches count as a whole, beside what is in them.
        """
        return {
            event.name: event.work.seconds
            if isinstance(event, Compute)
            else event.seconds
            for name in self._program.paths
            for event in self._program.events(name)
            if not isinstance(event, Done)
        }

    def timeline(self, name: str | None = None) -> Timeline:
        """The estimated timeline of one run of a computation: the steady state's."""
        loop = self.steady_state if name is None else self.loop(name)
        return self._program.timeline(loop.name)

    def chrome_trace(
        self, name: str | None = None, path: str | Path | None = None
    ) -> dict[str, Any]:
        """One run of a computation as a Chrome trace, for Perfetto.

        Args:
          name: of the computation; the steady state's by default.
          path: a file to write it to as well.

        Returns:
          What `json.dump` writes.
        """
        loop = self.steady_state if name is None else self.loop(name)
        title = f"{self.module}: {loop.name}"
        trace = chrome.trace(self._program, loop.name, title)
        if path is not None:
            Path(path).write_text(trace.dumps(), encoding="utf-8")
        return trace.as_json()

    @property
    def spans(self) -> tuple[TrackSpan, ...]:
        """What `figures.timeline` draws: one run of the steady state."""
        return spans_of(self._program, self.steady_state.name)

    def figure(self, name: str | None = None) -> Figure:
        """One run of a computation (the steady state) as a picture, compute and links.

        Raises:
          ImportError: matplotlib is not installed.
        """
        loop = self.steady_state if name is None else self.loop(name)
        hidden = lookup.find(f"{_RENDER}:hidden")(loop)
        return timeline(
            spans_of(self._program, loop.name),
            title=f"{self.module}: {loop.name}",
            note=f"estimated for {self.gpu.name}: {hidden}",
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as `to_json` writes it."""
        return {
            "module": self.module,
            "gpu": self.gpu.name,
            "gpus_per_node": self.gpus_per_node,
            "efficiency": self.efficiency,
            "assumptions": list(self.assumptions),
            "steady_state": self.steady_state.name if self.loops else None,
            "loops": [loop.to_dict() for loop in self.loops],
        }

    def to_json(self, indent: int | None = None) -> str:
        """All of it as one JSON object; docs/overlap.md names the fields."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self, name: str | None = None):
        """Collectives of a computation (the steady state) as a rich table.

        Raises:
          ImportError: rich is not installed.
        """
        return lookup.find(f"{_RENDER}:rich_table")(self, name)

    def summary(self, name: str | None = None) -> str:
        """What a computation (the steady state) comes to, in two lines."""
        return lookup.find(f"{_RENDER}:summary")(self, name)

    def text(self, name: str | None = None) -> str:
        """All loops, the collectives of one (the steady state), the assumptions."""
        return lookup.find(f"{_RENDER}:text")(self, name)

    def __str__(self) -> str:
        return self.text()

    _repr_html_ = lookup.method(f"{_RENDER}:html")


def _is_repeated(loop: LoopReport) -> bool:
    """Whether it is a loop, or a guard inside one."""
    in_loop = any(frame.source != GUARD for frame in loop.path)
    return loop.kind == "while" or (loop.kind == "guard" and in_loop)


def _weight(loop: LoopReport) -> float:
    return math.prod(frame.trips for frame in loop.path)


def overlap_report(
    compiled: jax.stages.Compiled | str,
    *,
    gpu: str | Gpu | None = None,
    gpus_per_node: int = 8,
    efficiency: float = 0.7,
    trip_counts: Mapping[str, float] | float | None = None,
) -> OverlapReport:
    r"""Reads a program compiled for GPUs: what of its communication runs under compute.

    Args:
      compiled: `jax.jit(f).lower(...).compile()` for GPUs, attached or of `gpu_mesh`;
        or the text of a scheduled module.
      gpu: whose peaks to reckon with: a key of `dualpipe_jax.gpu.topology.GPUS`, or a
        `Gpu`; by default what the program was compiled for.
      gpus_per_node: device i is taken to be in node `i // gpus_per_node`.
      efficiency: part of the peak FLOPs and of the memory's bandwidth that kernels
        reach.
      trip_counts: how often loops run whose trips depend on data: a number for all of
        them, or numbers by the name (or pattern) of the body.

    Returns:
      The report. Print it, or see `loops`, `steady_state`, `to_json`, `chrome_trace`.

    Raises:
      ValueError: the program is not for GPUs, not scheduled or no HLO; or `gpu` is not
        known and cannot be found out.

    Examples:
      >>> report = overlap_report('''HloModule f, is_scheduled=true, num_partitions=2
      ... ENTRY %main (p: bf16[1024,1024]) -> bf16[1024,1024] {
      ...   %p = bf16[1024,1024] parameter(0)
      ...   %go = (bf16[1024,1024], bf16[1024,1024]) collective-permute-start(%p), \
      ...     source_target_pairs={{0,1},{1,0}}
      ...   %y = bf16[1024,1024] dot(%p, %p), lhs_contracting_dims={1}, \
      ...     rhs_contracting_dims={0}
      ...   ROOT %x = bf16[1024,1024] collective-permute-done(%go)
      ... }''', gpu="h100")
      >>> permute = report.steady_state.collectives[0]
      >>> permute.num_bytes, permute.link, permute.under.flops == 2 * 1024**3
      (2097152.0, 'nvlink', True)
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"{efficiency=} must be above 0 and at most 1.")
    if gpus_per_node < 1:
        raise ValueError(f"{gpus_per_node=} must be at least 1.")
    given = trip_counts.values() if isinstance(trip_counts, Mapping) else [trip_counts]
    if any(trips is not None and trips < 0 for trips in given):
        raise ValueError(f"{trip_counts=} must not be negative.")
    if isinstance(compiled, str):
        text, device = compiled, None
    elif isinstance(compiled, jax.stages.Compiled):
        text, device = compiled.as_text(), _device_of(compiled)
        if text is None:
            raise ValueError("the compiled program has no text; pass its HLO as a str.")
        if device is not None and device.platform not in ("gpu", "cuda"):
            raise ValueError(
                f"the program was compiled for {device.platform!r}, where nothing "
                "overlaps; compile it for GPUs, which need not be there: see "
                "dualpipe_jax.gpu_mesh."
            )
    else:
        raise ValueError(
            f"compiled={type(compiled).__name__} is neither a jax.stages.Compiled nor "
            "text; call lower(...).compile() first."
        )
    chosen = _gpu(gpu, None if device is None else device.device_kind)
    module = hlo.parse(text)
    links = Links(module, chosen, gpus_per_node)
    roofline = Roofline(module, chosen, efficiency)
    program = Program(module, links, roofline, trip_counts)
    return OverlapReport(program, chosen, gpus_per_node, efficiency, roofline.unknown)


def _device_of(compiled: jax.stages.Compiled) -> Any:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    for sharding in shardings:
        for device in getattr(sharding, "device_set", ()):
            return device
    return None


def _gpu(gpu: str | Gpu | None, kind: str | None) -> Gpu:
    if isinstance(gpu, Gpu):
        return gpu
    if gpu is not None:
        if gpu not in GPUS:
            raise ValueError(
                f"{gpu=} is not known; choose one of {sorted(GPUS)}, or pass a Gpu."
            )
        return GPUS[gpu]
    for key, known in GPUS.items():
        if kind is not None and (kind == known.name or key.upper() in kind.upper()):
            return known
    raise ValueError(
        f"gpu={gpu}: the device kind {kind!r} tells no GPU; pass gpu= one of "
        f"{sorted(GPUS)}, or a dualpipe_jax.gpu.topology.Gpu with its peaks."
    )
