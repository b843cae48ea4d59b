"""Lowering: from a schedule to the tick program that the executor runs.

A `Program` lists, in plain NumPy tables, what every rank does in every tick, which
buffer slots hold its values, and which permutes run between the ticks. It holds no
array of the model and does not import jax.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dualpipe_jax.lowering.loops import Loop, find_loops
from dualpipe_jax.lowering.table import Table, tabulate
from dualpipe_jax.lowering.ticks import (
    Clock,
    Pairs,
    align_loops,
    place_messages,
    uniform_kinds,
)
from dualpipe_jax.schedules import (
    OPS,
    Costs,
    Schedule,
    StepSpan,
    Timeline,
    measure,
    simulate,
)

Kind = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A schedule as one program that all ranks run, tick by tick.

    Attributes:
      schedule: the schedule that was lowered.
      chunks: `chunks[rank][chunk]` is the stage that the rank knows as `chunk`. Which
        direction is chunk 0 alternates with the rank's parity, so that in DualPipe's
        steady state all ranks run the same kind of step in the same tick.
      kinds: the kinds of steps, each one task or a pair of (op, chunk).
      ticks: [num_ticks, num_ranks] position of the step that each rank starts, or -1.
      permutes: for each tick the (source, target) pairs of the permutes that
        follow its steps.
      loops: the steady states.
      table: the table that the executor reads.
      num_slots: number of activation slots (residuals between F and W).
      num_message_slots: number of slots for activations and cotangents in transit.
      num_wgrad_residual_slots: number of slots for what I keeps for W.
    """

    schedule: Schedule
    chunks: tuple[tuple[int, ...], ...]
    kinds: tuple[Kind, ...]
    ticks: np.ndarray
    permutes: tuple[tuple[Pairs, ...], ...]
    loops: tuple[Loop, ...]
    table: Table
    num_slots: int
    num_message_slots: int
    num_wgrad_residual_slots: int

    @property
    def num_ticks(self) -> int:
        return len(self.ticks)

    @property
    def num_rounds(self) -> int:
        """The largest number of permutes between two ticks."""
        return self.table.send.shape[-1]

    def __repr__(self) -> str:
        steady = sum(loop.stop - loop.start for loop in self.loops)
        return (
            f"Program({self.schedule.kind}, {self.num_ticks} ticks of which {steady} "
            f"steady, {self.num_slots} activation slots, {self.num_message_slots} "
            f"message slots, {self.num_wgrad_residual_slots} wgrad residual slots)"
        )


def lower(schedule: Schedule) -> Program:
    """Lowers a schedule to the tick program that the executor runs.

    Args:
      schedule: any valid schedule whose ranks all hold the same number of stages.

    Returns:
      The program. `simulate(program, costs)` includes the waiting for its permutes.

    Raises:
      ValueError: if ranks hold different numbers of stages.

    Examples:
      >>> from dualpipe_jax import dualpipe
      >>> lower(dualpipe(4, 8)).num_slots
      5
    """
    clock = Clock.of(schedule)
    chunks = _name_chunks(schedule)
    names, kinds = _name_kinds(schedule, chunks)
    is_pair = np.array([len(kind) == 2 for kind in names])
    align_loops(clock, kinds, is_pair)
    messages, permutes = place_messages(clock)
    kinds_at = clock.kinds_at(kinds)
    table, slots = tabulate(clock, kinds_at, messages)
    first = schedule.arrays.first[:-1]
    return Program(
        schedule=schedule,
        chunks=chunks,
        kinds=names,
        ticks=np.where(clock.steps < 0, -1, clock.steps - first).astype(np.int32),
        permutes=permutes,
        loops=find_loops(uniform_kinds(kinds_at), is_pair, permutes),
        table=table,
        num_slots=slots["activation"],
        num_message_slots=slots["message"],
        num_wgrad_residual_slots=slots["wgrad_residuals"],
    )


def _name_chunks(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    arrays = schedule.arrays
    is_held = np.zeros((schedule.num_ranks, schedule.num_stages), bool)
    is_held[arrays.rank[arrays.step], arrays.stage] = True
    held = [np.flatnonzero(own).tolist() for own in is_held]
    if len({len(stages) for stages in held}) != 1:
        raise ValueError(
            f"{schedule.kind=} gives its ranks different numbers of stages "
            f"({[len(stages) for stages in held]}); one SPMD program needs the same "
            "number on every rank."
        )
    if len(held[0]) == 1 or schedule.num_stages % schedule.num_ranks:
        return tuple(map(tuple, held))
    owner = arrays.rank[arrays.made[0]]  # [stages, microbatches], of F
    return tuple(
        tuple(sorted(stages, key=lambda stage: _direction(owner, rank, stage)))
        for rank, stages in enumerate(held)
    )


def _direction(owner: np.ndarray, rank: int, stage: int) -> tuple[int, int]:
    """Returns a key that orders a rank's stages, with directions swapped on odd ranks.

    A stage whose successor is on a higher rank runs in direction 0.
    """
    num_stages = len(owner)
    microbatch = int(np.argmax(owner[stage] == rank))
    other = stage + 1 if stage + 1 < num_stages else stage - 1
    there = int(owner[max(other, 0), microbatch]) - rank
    ahead = there if other > stage else -there
    down = ahead < 0 or (ahead == 0 and stage >= num_stages // 2)
    return (down ^ rank % 2, stage)


def _name_kinds(
    schedule: Schedule, chunks: tuple[tuple[int, ...], ...]
) -> tuple[tuple[Kind, ...], np.ndarray]:
    """Returns the kinds of steps, sorted, and the index of each step's: [steps]."""
    arrays = schedule.arrays
    chunk_of = np.zeros((schedule.num_ranks, schedule.num_stages), np.int64)
    for rank, own in enumerate(chunks):
        chunk_of[rank, list(own)] = np.arange(len(own))
    # A task as a number, and a step as that of one or of two.
    chunk, base = chunk_of[arrays.rank[arrays.step], arrays.stage], len(chunks[0])
    task = arrays.op * base + chunk + 1
    is_second = np.append(False, arrays.step[1:] == arrays.step[:-1])
    code = np.zeros(len(arrays.rank), np.int64)
    code[arrays.step[~is_second]] = task[~is_second]
    many = len(OPS) * base + 1
    code[arrays.step[is_second]] += many * task[is_second]

    def kind(code: int) -> Kind:
        tasks = [code % many, code // many] if code >= many else [code]
        return tuple((OPS[(each - 1) // base], (each - 1) % base) for each in tasks)

    codes, index = np.unique(code, return_inverse=True)
    kinds = [kind(each) for each in codes.tolist()]
    names = tuple(sorted(kinds))
    return names, np.array([names.index(each) for each in kinds])[index]


@simulate.register
def _(program: Program, costs: Costs = Costs()) -> Timeline:  # noqa: B008
    """Simulates the program's steps and permutes with one clock per rank."""
    schedule = program.schedule
    now = [0.0] * schedule.num_ranks
    spans: list[list[StepSpan]] = [[] for _ in range(schedule.num_ranks)]
    for tick in range(program.num_ticks):
        for rank in range(schedule.num_ranks):
            position = int(program.ticks[tick, rank])
            if position < 0:
                continue
            step = schedule.steps[rank][position]
            start = now[rank]
            now[rank] = start + costs.of(step)
            spans[rank].append((step, start, now[rank]))
        for pairs in program.permutes[tick]:
            # The two ends of a pair wait for each other; a rank continues once its send
            # and its receive are both complete.
            done = {pair: max(now[pair[0]], now[pair[1]]) + costs.p2p for pair in pairs}
            for pair, time in done.items():
                for rank in pair:
                    now[rank] = max(now[rank], time)
    return measure(schedule, spans, costs)
