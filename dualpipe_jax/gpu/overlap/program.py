"""How a module runs: where each computation is called, how often, and how long."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping

from dualpipe_jax.gpu.overlap import collectives, guesses, timeline
from dualpipe_jax.gpu.overlap.collectives import Collective
from dualpipe_jax.gpu.overlap.hlo import Computation, Module
from dualpipe_jax.gpu.overlap.instructions import Instruction
from dualpipe_jax.gpu.overlap.links import Links, Traffic
from dualpipe_jax.gpu.overlap.timeline import Compute, Done, Event, HloTimeline, Start
from dualpipe_jax.gpu.overlap.work import KernelWork, Roofline

KNOWN, GUARD, GIVEN, BLOCKS, UNKNOWN = "known", "guard", "given", "blocks", "unknown"
RARE = "rare"
# A named scope of loops that usually have no trip at all.
RARELY = "rarely"


@dataclasses.dataclass(frozen=True)
class Trips:
    """How often a loop's body runs each time that the loop is reached.

    Attributes:
      count: the number that times are estimated with.
      source: where the count is from. `known`: XLA knows it. `guard`: zero or one, and
        one is taken. `given`: by `trip_counts`. `blocks`: the body fills a buffer block
        by block, and is guessed to fill it once. `unknown`: one is taken.
    """

    count: float
    source: str


@dataclasses.dataclass(frozen=True)
class CallFrame:
    """A loop or a branch on the way from the entry to a computation.

    Attributes:
      kind: `while` or `branch`.
      computation: the body, or the branch.
      trips: of the loop; 1 for a branch.
      source: see `Trips`; `guard` for a branch, which runs at most once.
    """

    kind: str
    computation: str
    trips: float
    source: str


Path = tuple[CallFrame, ...]


class HloProgram:
    """A module with costs.

    Args:
      module: what was compiled.
      links: estimates its collectives.
      roofline: estimates its kernels.
      trip_counts: of loops whose trips XLA does not know: one number for all, or
        numbers by the name of the body, or by a pattern such as `region_7.*`. They
        override guesses.
    """

    def __init__(
        self,
        module: Module,
        links: Links,
        roofline: Roofline,
        trip_counts: Mapping[str, float] | float | None = None,
    ):
        self.module, self._links, self._roofline = module, links, roofline
        self._given = trip_counts
        self._timelines: dict[str, HloTimeline] = {}
        self._events: dict[str, list[Event]] = {}
        self._found: dict[str, dict[str, tuple[Collective, Traffic]]] = {}

    def timeline(self, name: str) -> HloTimeline:
        """Returns the timeline of one run of a computation."""
        if name not in self._timelines:
            self._timelines[name] = timeline.run(self.events(name))
        return self._timelines[name]

    def events(self, name: str) -> list[Event]:
        """Returns a computation's events in order, those of its calls among them."""
        if name not in self._events:
            self._found[name], self._events[name] = {}, []
            self._read(self.module[name], self._found[name], self._events[name])
        return self._events[name]

    def collectives(self, name: str) -> dict[str, tuple[Collective, Traffic]]:
        """Returns a computation's own collectives, by the name of their start."""
        self.events(name)
        return self._found[name]

    def _read(self, where: Computation, found: dict, events: list[Event]) -> None:
        started: dict[str, str] = {}
        for op in where.instructions:
            collective = collectives.find(op, where, self.module)
            origin = collectives.started_by(op)
            if collective is not None:
                traffic = self._links.traffic(
                    collective.kind, collective.op, collective.where
                )
                found[op.name] = collective, traffic
                started[op.name] = op.name
                events.append(Start(op.name, traffic.seconds, traffic.link))
                if not collective.asynchronous:
                    events.append(Done(op.name))
            elif origin is not None:  # an update or a done
                if origin in started:  # of a collective; others are free
                    started[op.name] = started[origin]
                    if op.opcode.endswith("-done"):
                        events.append(Done(started[origin]))
            elif op.opcode == "call":
                for name in op.called("to_apply"):
                    self._read(self.module[name], found, events)
            else:
                work = self._work(op, where)
                if work.kernels:
                    events.append(Compute(op.name, work, op.op_name))

    def _work(self, op: Instruction, where: Computation) -> KernelWork:
        if op.opcode == "while":
            body, condition = op.called("body")[0], op.called("condition")[0]
            times = self.trips(op).count
            return self._whole(body) * times + self._whole(condition) * (times + 1)
        if op.opcode == "conditional":
            works = [self._whole(name) for name in branches(op)]
            return max(works, key=lambda work: work.seconds)
        if op.opcode == "async-start":  # compute on another stream, taken as in order
            works = [self._whole(name) for name in op.called("calls")]
            return sum(works, KernelWork())
        return self._roofline.kernel(op, where)

    def _whole(self, name: str) -> KernelWork:
        done = self.timeline(name)
        return dataclasses.replace(done.compute, seconds=done.makespan)

    def trips(self, op: Instruction) -> Trips:
        """Returns how often a `while` runs its body."""
        known = op.backend_config.get("known_trip_count", {}).get("n")
        if known is not None:
            return Trips(int(known), KNOWN)
        body = op.called("body")[0]
        given = self._given
        if isinstance(given, Mapping):
            matching = (
                trips
                for pattern, trips in given.items()
                if fnmatch.fnmatchcase(body, pattern)
            )
            given = next(matching, None)
        is_guard = guesses.is_guard(self.module, op)
        if given is not None and not (is_guard and given is self._given):
            return Trips(given, GIVEN)
        if is_guard:
            return Trips(1, GUARD)
        if RARELY in op.op_name.split("/"):
            return Trips(0, RARE)
        blocks = self._blocks.get(body)
        return Trips(1, UNKNOWN) if blocks is None else Trips(blocks, BLOCKS)

    @functools.cached_property
    def _blocks(self) -> dict[str, float]:
        return guesses.blocks(self.module)

    @functools.cached_property
    def paths(self) -> dict[str, list[Path]]:
        """All paths from the entry to each loop body, branch, and the entry itself."""
        found: dict[str, list[Path]] = {self.module.entry.name: [()]}
        self._walk(self.module.entry.name, (), found)
        return found

    def _walk(self, name: str, path: Path, found: dict[str, list[Path]]) -> None:
        for op in self.module[name].instructions:
            frames: list[CallFrame] = []
            if op.opcode == "while":
                trips = self.trips(op)
                body = op.called("body")[0]
                frames = [CallFrame("while", body, trips.count, trips.source)]
            elif op.opcode == "conditional":
                frames = [CallFrame("branch", each, 1, GUARD) for each in branches(op)]
            elif op.opcode == "call":
                for each in op.called("to_apply"):
                    self._walk(each, path, found)
            for frame in frames:
                there = (*path, frame)
                found.setdefault(frame.computation, []).append(there)
                self._walk(frame.computation, there, found)


def branches(op: Instruction) -> list[str]:
    """Returns the names of a `conditional`'s computations."""
    return op.called("branch_computations", "true_computation", "false_computation")
