"""The report on how much of a program's communication runs under compute."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpipe_jax.gpu.gpus import Gpu
from dualpipe_jax.gpu.overlap import chrome
from dualpipe_jax.gpu.overlap.assumptions import assumptions
from dualpipe_jax.gpu.overlap.program import GUARD, HloProgram
from dualpipe_jax.gpu.overlap.records import CollectiveReport, LoopReport, read_loop
from dualpipe_jax.gpu.overlap.spans import spans_of
from dualpipe_jax.gpu.overlap.timeline import Compute, Done, HloTimeline
from dualpipe_jax.pictures import TrackSpan, timeline
from eplb_jax import lookup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RENDER = "dualpipe_jax.gpu.overlap.render"


class OverlapReport:
    """How much of a compiled program's communication is hidden under compute.

    Attributes:
      module: the module's name.
      gpu: the GPU that times are estimated for.
      gpus_per_node: devices per node.
      efficiency: fraction of the GPU's peaks that kernels are taken to reach.
      loops: computations with collectives, those with the most communication in all
        their runs first.
      assumptions: what is taken for granted or guessed, in words.
    """

    def __init__(
        self,
        program: HloProgram,
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
        """The collectives of all loops."""
        return tuple(each for loop in self.loops for each in loop.collectives)

    @functools.cached_property
    def steady_state(self) -> LoopReport:
        """The loop whose own collectives take the most time in one run of its body.

        Where ranks differ in what they run in a trip, it may be a guard inside a loop.
        It is a branch or the entry only if there is nothing else.

        Raises:
          ValueError: the module has no collectives.
        """
        if not self.loops:
            raise ValueError(
                f"the module {self.module} has no collectives, so no steady state; "
                "compile it for more than one device."
            )
        loops = [loop for loop in self.loops if _is_repeated(loop)]
        return max(
            loops or self.loops,
            key=lambda loop: (loop.communication_s, loop.kind == "while"),
        )

    def loop(self, name: str) -> LoopReport:
        """Returns the loop, branch or entry of a name, or of the name's beginning.

        Raises:
          ValueError: no computation with collectives, or more than one, matches.
        """
        exact = [loop for loop in self.loops if loop.name == name]
        found = exact or [loop for loop in self.loops if loop.name.startswith(name)]
        if len(found) != 1:
            names = [loop.name for loop in found or self.loops]
            raise ValueError(
                f"{name=} matches {len(found)} computations with collectives; choose "
                f"one of {', '.join(names) or 'none'}."
            )
        return found[0]

    def costs(self) -> dict[str, float]:
        """Returns the seconds of each kernel and collective, by instruction name.

        Loops and branches are listed as a whole, as well as what is in them.
        """
        return {
            event.name: event.work.seconds
            if isinstance(event, Compute)
            else event.seconds
            for name in self._program.paths
            for event in self._program.events(name)
            if not isinstance(event, Done)
        }

    def timeline(self, name: str | None = None) -> HloTimeline:
        """Returns the estimated timeline of a computation (the steady state)."""
        loop = self.steady_state if name is None else self.loop(name)
        return self._program.timeline(loop.name)

    def chrome_trace(
        self, name: str | None = None, path: str | Path | None = None
    ) -> dict[str, Any]:
        """Returns one run of a computation as a Chrome trace, for Perfetto.

        Args:
          name: of the computation; by default the steady state.
          path: a file to write the trace to as well.

        Returns:
          A dict for `json.dump`.
        """
        loop = self.steady_state if name is None else self.loop(name)
        title = f"{self.module}: {loop.name}"
        trace = chrome.trace(self._program, loop.name, title)
        if path is not None:
            Path(path).write_text(trace.dumps(), encoding="utf-8")
        return trace.as_json()

    @property
    def spans(self) -> tuple[TrackSpan, ...]:
        """One run of the steady state, for `pictures.timeline`."""
        return spans_of(self._program, self.steady_state.name)

    def figure(self, name: str | None = None) -> Figure:
        """Draws one run of a computation (the steady state): compute and links.

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
        """Returns the report as plain data, as `to_json` writes it."""
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
        """Returns the report as one JSON object; docs/overlap.md names the fields."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self, name: str | None = None):
        """Returns a computation's collectives (the steady state's) as a rich table.

        Raises:
          ImportError: rich is not installed.
        """
        return lookup.find(f"{_RENDER}:rich_table")(self, name)

    def summary(self, name: str | None = None) -> str:
        """Summarizes a computation (the steady state) in two lines."""
        return lookup.find(f"{_RENDER}:summary")(self, name)

    def text(self, name: str | None = None) -> str:
        """Returns tables of all loops and of one's collectives, and the assumptions."""
        return lookup.find(f"{_RENDER}:text")(self, name)

    def __str__(self) -> str:
        return self.text()

    _repr_html_ = lookup.method(f"{_RENDER}:html")


def _is_repeated(loop: LoopReport) -> bool:
    """Returns whether it is a loop, or a guard inside one."""
    in_loop = any(frame.source != GUARD for frame in loop.path)
    return loop.kind == "while" or (loop.kind == "guard" and in_loop)


def _weight(loop: LoopReport) -> float:
    return math.prod(frame.trips for frame in loop.path)
