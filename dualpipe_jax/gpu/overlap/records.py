"""Reports on one collective, and on one computation that has collectives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dualpipe_jax.gpu.overlap import phases
from dualpipe_jax.gpu.overlap.program import GIVEN, GUARD, KNOWN, CallFrame, HloProgram
from dualpipe_jax.gpu.overlap.work import KernelWork


@dataclasses.dataclass(frozen=True)
class CollectiveReport:
    """One collective in one run of its computation.

    Attributes:
      name: of the instruction (of its start).
      kind: such as `all-to-all`.
      phase: such as `dispatch(F)`; the program's own name where the phase is unknown.
      computation: the loop body, branch or entry that contains it.
      asynchronous: whether other instructions may run meanwhile.
      group_size: devices that communicate with each other; 2 for a permute.
      inside_bytes: sent by the slowest device inside its own node.
      between_bytes: sent by it to other nodes.
      link: `nvlink`, `network` or `local`.
      seconds: on an idle link.
      exposed_s: seconds in which compute waits for it.
      under: the compute between its start and its done.
      op_name: its name in the program; empty where XLA has dropped it.
    """

    name: str
    kind: str
    phase: str
    computation: str
    asynchronous: bool
    group_size: int
    inside_bytes: float
    between_bytes: float
    link: str
    seconds: float
    exposed_s: float
    under: KernelWork
    op_name: str

    @property
    def hidden_s(self) -> float:
        return max(0.0, self.seconds - self.exposed_s)

    @property
    def num_bytes(self) -> float:
        return self.inside_bytes + self.between_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data, for JSON."""
        names = (
            "name kind phase asynchronous group_size inside_bytes between_bytes link"
        )
        return {
            **{name: getattr(self, name) for name in names.split()},
            "bytes": self.num_bytes,
            "seconds": self.seconds,
            "hidden_s": self.hidden_s,
            "exposed_s": self.exposed_s,
            "under": dataclasses.asdict(self.under),
            "op_name": self.op_name,
        }


@dataclasses.dataclass(frozen=True)
class LoopReport:
    """A computation that contains collectives: a loop's body, a branch, or the entry.

    Times are of one run. Loops and branches inside count as compute.

    Attributes:
      name: of the computation.
      kind: `while`, `guard`, `branch` or `entry`.
      path: the loops and branches around it, the outermost first and itself last.
      runs: how often one execution of the module runs it; None where data, a guard or
        a branch decides.
      runs_at_most: the same with guards and branches taken; None where data decide.
      makespan_s: of one run.
      compute: work of one run.
      collectives: its own, in the order of their starts.
    """

    name: str
    kind: str
    path: tuple[CallFrame, ...]
    runs: float | None
    runs_at_most: float | None
    makespan_s: float
    compute: KernelWork
    collectives: tuple[CollectiveReport, ...]

    @property
    def communication_s(self) -> float:
        return math.fsum(each.seconds for each in self.collectives)

    @property
    def exposed_s(self) -> float:
        return math.fsum(each.exposed_s for each in self.collectives)

    @property
    def hidden_s(self) -> float:
        return math.fsum(each.hidden_s for each in self.collectives)

    @property
    def hidden_fraction(self) -> float:
        """Hidden fraction of the communication time; 1 without communication."""
        return self.hidden_s / self.communication_s if self.communication_s else 1.0

    @property
    def without_gemms(self) -> tuple[CollectiveReport, ...]:
        """Collectives with no matrix product between start and done."""
        return tuple(each for each in self.collectives if not each.under.gemms)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data, for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "path": [dataclasses.asdict(frame) for frame in self.path],
            "runs": self.runs,
            "runs_at_most": self.runs_at_most,
            "makespan_s": self.makespan_s,
            "communication_s": self.communication_s,
            "hidden_s": self.hidden_s,
            "exposed_s": self.exposed_s,
            "hidden_fraction": self.hidden_fraction,
            "without_gemms": [each.name for each in self.without_gemms],
            "compute": dataclasses.asdict(self.compute),
            "collectives": [each.to_dict() for each in self.collectives],
        }


def read_loop(program: HloProgram, name: str) -> LoopReport:
    """Reports on one computation of a program."""
    timeline = program.timeline(name)
    rows = []
    for start, (collective, traffic) in program.collectives(name).items():
        phase = phases.phase_of(program, name, start)
        rows.append(
            CollectiveReport(
                name=start,
                kind=collective.kind,
                phase=phase,
                computation=name,
                asynchronous=collective.asynchronous,
                group_size=traffic.group_size,
                inside_bytes=traffic.inside_bytes,
                between_bytes=traffic.between_bytes,
                link=traffic.link,
                seconds=traffic.seconds,
                exposed_s=timeline.exposed[start],
                under=timeline.under[start],
                op_name=collective.op.op_name,
            )
        )
    paths = program.paths[name]
    last = paths[0][-1] if paths[0] else None
    kind = "entry" if last is None else last.kind
    if last is not None and last.kind == "while" and last.source == GUARD:
        kind = "guard"
    sources = {frame.source for path in paths for frame in path}
    times = sum(math.prod(frame.trips for frame in path) for path in paths)
    certain = sources <= {KNOWN, GIVEN, GUARD}
    return LoopReport(
        name=name,
        kind=kind,
        path=paths[0],
        runs=times if certain and GUARD not in sources else None,
        runs_at_most=times if certain else None,
        makespan_s=timeline.makespan,
        compute=timeline.compute,
        collectives=tuple(rows),
    )
