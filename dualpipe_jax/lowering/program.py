"""Lowering: from a schedule to the tick program that the executor runs.

A `Program` lists, in plain NumPy tables, what every rank does in every tick, which
buffer slots hold its values, and which permutes run between the ticks. It holds no
array of the model and does not import jax.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from dualpipe_jax.lowering.slots import Interval, assign_slots
from dualpipe_jax.lowering.ticks import (
    Clock,
    Kind,
    Loop,
    Message,
    align_loops,
    find_loops,
    links,
    place_messages,
    producers,
    split_rounds,
    step_kind,
)
from dualpipe_jax.schedules import (
    Costs,
    Schedule,
    StepSpan,
    Task,
    Timeline,
    measure,
    simulate,
)

Pairs = tuple[tuple[int, int], ...]


class Table(NamedTuple):
    """What each rank does in each tick: int32 arrays [num_ticks, num_ranks].

    Fields of tasks that a tick does not run hold 0. Slots named `*_in` and `*_out` are
    message slots.
    """

    kind: np.ndarray  # index into Program.kinds, -1 when the rank starts nothing
    f_microbatch: np.ndarray
    f_first: np.ndarray  # 1 where F is the first stage's: its input is embedded
    f_last: np.ndarray  # 1 where F is the last stage's: its output makes the loss
    f_in: np.ndarray
    f_out: np.ndarray
    f_slot: np.ndarray  # activation slot that F fills
    b_microbatch: np.ndarray  # of B, I or W
    b_first: np.ndarray  # 1 where B or I is the first stage's
    b_in: np.ndarray
    b_out: np.ndarray
    b_slot: np.ndarray  # activation slot that B, I or W reads
    wgrad_slot: np.ndarray  # slot of wgrad residuals that I fills or W reads
    loss_out: np.ndarray  # message slot for the cotangent of the loss
    send: np.ndarray  # [num_ticks, num_ranks, rounds]: message slot sent
    receive: np.ndarray  # [num_ticks, num_ranks, rounds]: slot filled, or the spare one


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
    clock = Clock(schedule)
    chunks = _name_chunks(schedule)
    chunk_of = [{stage: c for c, stage in enumerate(own)} for own in chunks]
    kinds = [
        [step_kind(step, chunk_of[rank]) for step in steps]
        for rank, steps in enumerate(schedule.steps)
    ]
    align_loops(clock, kinds)
    rounds: list[list[list[Message]]] = [[] for _ in clock.times]
    by_boundary: dict[int, list[Message]] = {}
    for message in place_messages(clock):
        by_boundary.setdefault(message.boundary, []).append(message)
    for boundary, messages in by_boundary.items():
        # A permute at a boundary is issued after the steps of the tick before it.
        rounds[boundary - 1] = split_rounds(messages)
    permutes = tuple(
        tuple(
            tuple(sorted((m.sender.rank, m.receiver.rank) for m in group))
            for group in groups
        )
        for groups in rounds
    )
    ticks = np.full((len(clock.times), schedule.num_ranks), -1, np.int32)
    for rank, starts in enumerate(clock.ticks):
        ticks[starts, rank] = np.arange(len(starts))
    names = tuple(sorted({kind for of_rank in kinds for kind in of_rank}))
    table, slots = _Tabulator(schedule, ticks, rounds).tabulate(kinds, names)
    return Program(
        schedule=schedule,
        chunks=chunks,
        kinds=names,
        ticks=ticks,
        permutes=permutes,
        loops=find_loops(clock, kinds, list(permutes)),
        table=table,
        num_slots=slots["activation"],
        num_message_slots=slots["message"],
        num_wgrad_residual_slots=slots["wgrad_residuals"],
    )


def _name_chunks(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    held: list[set[int]] = [set() for _ in range(schedule.num_ranks)]
    for rank, _, step in schedule:
        held[rank].update(task.stage for task in step)
    if len({len(stages) for stages in held}) != 1:
        raise ValueError(
            f"{schedule.kind=} gives its ranks different numbers of stages "
            f"({[len(stages) for stages in held]}); one SPMD program needs the same "
            "number on every rank."
        )
    if len(held[0]) == 1 or schedule.num_stages % schedule.num_ranks:
        return tuple(tuple(sorted(stages)) for stages in held)
    return tuple(
        tuple(sorted(stages, key=lambda stage: _direction(schedule, rank, stage)))
        for rank, stages in enumerate(held)
    )


def _direction(schedule: Schedule, rank: int, stage: int) -> tuple[int, int]:
    """Returns a key that orders a rank's stages, with directions swapped on odd ranks.

    A stage whose successor is on a higher rank runs in direction 0.
    """
    microbatch = next(
        m
        for m in range(schedule.num_microbatches)
        if schedule._owners[stage, m] == rank
    )
    other = stage + 1 if stage + 1 < schedule.num_stages else stage - 1
    there = schedule.rank_of(max(other, 0), microbatch) - rank
    ahead = there if other > stage else -there
    down = ahead < 0 or (ahead == 0 and stage >= schedule.num_stages // 2)
    return (down ^ rank % 2, stage)


class _Tabulator:
    """Fills the table by following every value from its writer to its last reader."""

    def __init__(self, schedule: Schedule, ticks, rounds: list[list[list[Message]]]):
        self.schedule = schedule
        self.rounds = rounds
        self.num_rounds = max(map(len, rounds), default=0)
        self.tick_of = {
            (rank, int(position)): tick
            for (tick, rank), position in np.ndenumerate(ticks)
            if position >= 0
        }
        shape = ticks.shape
        self.fields = {name: np.zeros(shape, np.int32) for name in Table._fields}
        for name in ("send", "receive"):
            self.fields[name] = np.zeros((*shape, self.num_rounds), np.int32)
        # Per kind of slot: the lifetimes of values, and which fields name the slot.
        self.lives: dict[str, list[Interval]] = {
            name: [] for name in ("activation", "message", "wgrad_residuals")
        }
        self.uses: dict[str, list[list[tuple]]] = {name: [] for name in self.lives}

    # The order of events in a tick. A step reads all its operands before it writes.
    EMBED, READ, WRITE, LOSS_READ, LOSS_WRITE, EMBED_BACKWARD, PERMUTE = range(7)

    def _time(self, tick: int, phase: int) -> int:
        return tick * (self.PERMUTE + 2 * self.num_rounds) + phase

    def _keep(self, pool: str, rank: int, start, end, *uses: tuple) -> None:
        self.lives[pool].append(Interval(self._time(*start), self._time(*end), rank))
        self.uses[pool].append(list(uses))

    def tabulate(self, kinds, names) -> tuple[Table, dict[str, int]]:
        self.fields["kind"][:] = -1
        made = producers(self.schedule)
        for rank, position, step in self.schedule:
            tick = self.tick_of[rank, position]
            at = (tick, rank)
            self.fields["kind"][at] = names.index(kinds[rank][position])
            for task in step:
                self._task(task, at, made)
        self._messages()
        sizes = {}
        for pool, lives in self.lives.items():
            slots, sizes[pool] = assign_slots(lives)
            if pool == "message":
                # A rank that receives nothing in a permute writes to the spare slot.
                self.fields["receive"][:] = sizes[pool]
            for slot, uses in zip(slots, self.uses[pool], strict=True):
                for name, *index in uses:
                    self.fields[name][tuple(index)] = slot
        return Table(**self.fields), sizes

    def _task(self, task: Task, at: tuple[int, int], made) -> None:
        tick, rank = at
        op, stage, microbatch = task
        last = self.schedule.num_stages - 1

        def tick_of(op: str, stage: int) -> int:
            return self.tick_of[made[Task(op, stage, microbatch)]]

        if op == "F":
            self.fields["f_microbatch"][at] = microbatch
            self.fields["f_first"][at] = stage == 0
            self.fields["f_last"][at] = stage == last
            if stage == 0:
                use = ("f_in", *at)
                self._keep("message", rank, (tick, self.EMBED), (tick, self.READ), use)
            if stage == last:
                use = ("f_out", *at)
                ends = (tick, self.LOSS_READ)
                self._keep("message", rank, (tick, self.WRITE), ends, use)
            if self.schedule.is_forward_only:
                return
            if stage == last:
                back = tick_of("I", stage)
                starts, ends = (tick, self.LOSS_WRITE), (back, self.READ)
                uses = ("loss_out", *at), ("b_in", back, rank)
                self._keep("message", rank, starts, ends, *uses)
            end = made.get(Task("W", stage, microbatch), made[task._replace(op="I")])
            done = self.tick_of[end]
            uses = [("f_slot", *at), ("b_slot", done, rank)]
            uses.append(("b_slot", tick_of("I", stage), rank))
            # The slot is taken while F still runs beside the B that frees another.
            starts, ends = (tick, self.READ), (done, self.READ)
            self._keep("activation", rank, starts, ends, *uses)
        elif op == "W":
            self.fields["b_microbatch"][at] = microbatch
            filled = tick_of("I", stage)
            starts, ends = (filled, self.WRITE), (tick, self.READ)
            uses = ("wgrad_slot", filled, rank), ("wgrad_slot", *at)
            self._keep("wgrad_residuals", rank, starts, ends, *uses)
        else:
            self.fields["b_microbatch"][at] = microbatch
            self.fields["b_first"][at] = stage == 0
            if stage == 0:
                use = ("b_out", *at)
                ends = (tick, self.EMBED_BACKWARD)
                self._keep("message", rank, (tick, self.WRITE), ends, use)

    def _messages(self) -> None:
        """Moves values within a rank from out-slot to in-slot, others by permute."""
        for tick, groups in enumerate(self.rounds):
            for k, group in enumerate(groups):
                for task, sender, receiver, _ in group:
                    out, into = (
                        ("f_out", "f_in") if task.op == "F" else ("b_out", "b_in")
                    )
                    self._keep(
                        "message",
                        sender.rank,
                        (sender.tick, self.WRITE),
                        (tick, self.PERMUTE + 2 * k),
                        (out, sender.tick, sender.rank),
                        ("send", tick, sender.rank, k),
                    )
                    self._keep(
                        "message",
                        receiver.rank,
                        (tick, self.PERMUTE + 2 * k + 1),
                        (receiver.tick, self.READ),
                        ("receive", tick, receiver.rank, k),
                        (into, receiver.tick, receiver.rank),
                    )
        for task, (rank, made), (target, used) in links(self.schedule):
            if rank != target:
                continue
            out, into = ("f_out", "f_in") if task.op == "F" else ("b_out", "b_in")
            here, there = self.tick_of[rank, made], self.tick_of[rank, used]
            uses = (out, here, rank), (into, there, rank)
            starts, ends = (here, self.WRITE), (there, self.READ)
            self._keep("message", rank, starts, ends, *uses)


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
