"""A pipeline schedule as data: which rank runs which task, in which order.

A `Schedule` is a frozen table that validates itself. Generators (one algorithm
a file) only build such tables; one simulator, one lowering and one executor
serve all of them. Nothing here imports jax, so a schedule can be studied
anywhere.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import operator
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

OPS = ("F", "B", "I", "W")

_TASK = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\((\d+[FBIW]\d+);(\d+[FBIW]\d+)\)OVERLAP_F_B")


class Task(NamedTuple):
    """One unit of work: what is done, by which stage, on which microbatch.

    Attributes:
      op: `"F"` forward, `"B"` full backward, `"I"` backward for input only,
        `"W"` backward for weights only; a B is an I and a W together.
      stage: logical stage, 0 is the first slice of the model.
      microbatch: numbered once over both directions.

    Examples:
      >>> str(Task("F", 0, 3))
      '0F3'
    """

    op: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"


Step = tuple[Task, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """What every rank does, in order.

    In a notebook a schedule shows itself as a picture, simulated at unit costs.

    Attributes:
      kind: name of the algorithm, such as `"dualpipe"`.
      num_ranks: size of the pipeline mesh axis.
      num_stages: number of logical stages.
      num_microbatches: microbatches of one training step, both directions.
      steps: for each rank a tuple of steps; a step is a tuple of one `Task`, or
        of two (an F and a B of different microbatches) executed together so that
        each hides the other's communication.

    Raises:
      ValueError: a rank has no step, a task is missing, done twice or unknown, an
        F stands after its B, an I after its W, one (stage, microbatch) is spread
        over several ranks, a schedule is part forward-only, or ranks wait for
        each other for ever.

    Examples:
      >>> schedule = Schedule.from_csv("0F0,0B0", kind="mine")
      >>> schedule.num_stages, schedule.num_microbatches
      (1, 1)
      >>> schedule
      Schedule('mine', num_ranks=1, num_stages=1, num_microbatches=1)
    """

    kind: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    steps: tuple[tuple[Step, ...], ...]

    def __post_init__(self):
        _check_shape(self)
        _check_complete(self, _check_steps(self))
        self.dependency_order  # noqa: B018  (raises when ranks deadlock)

    def __repr__(self) -> str:
        return (
            f"Schedule({self.kind!r}, num_ranks={self.num_ranks}, "
            f"num_stages={self.num_stages}, num_microbatches={self.num_microbatches})"
        )

    def __iter__(self) -> Iterator[tuple[int, int, Step]]:
        """Yields (rank, position in the rank's order, step)."""
        for rank, steps in enumerate(self.steps):
            for position, step in enumerate(steps):
                yield rank, position, step

    @property
    def is_forward_only(self) -> bool:
        """Whether the schedule holds nothing but F tasks."""
        return all(task.op == "F" for _, _, step in self for task in step)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that holds `stage` for `microbatch`."""
        return self._owners[stage, microbatch]

    def direction_of(self, stage: int, microbatch: int) -> int:
        """Which of the two streams through the ranks the task belongs to.

        A microbatch visits the ranks in runs, upwards or downwards; a new run
        begins where the stages turn (DualPipeV) or wrap round (interleaved
        schedules). Runs alternate between direction 0 and 1, and the first is 0
        when it goes upwards: DualPipe's two directions, DualPipeV's two phases.

        Examples:
          >>> v = Schedule.from_csv("0F0,1F0,1B0,0B0", kind="v")
          >>> v.direction_of(0, 0), v.direction_of(1, 0)
          (0, 1)
        """
        return self._directions[microbatch][stage]

    @functools.cached_property
    def _owners(self) -> dict[tuple[int, int], int]:
        return {
            (task.stage, task.microbatch): rank
            for rank, _, step in self
            for task in step
        }

    @functools.cached_property
    def _directions(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            _directions_along(
                tuple(self.rank_of(stage, m) for stage in range(self.num_stages))
            )
            for m in range(self.num_microbatches)
        )

    @functools.cached_property
    def dependency_order(self) -> tuple[tuple[int, int], ...]:
        """(rank, position) of every step, each after all that it waits for."""
        return _dependency_order(self)

    def forward_only(self) -> Schedule:
        """The same order with nothing but its F tasks, for inference."""
        steps = tuple(
            tuple((task,) for step in rank for task in step if task.op == "F")
            for rank in self.steps
        )
        return dataclasses.replace(self, kind=f"{self.kind}_forward", steps=steps)

    def to_csv(self) -> str:
        """The compute-only CSV of torch.distributed.pipelining, one row a rank.

        An overlapped pair is written `(0F3;7B1)OVERLAP_F_B`.
        """
        return "".join(
            ",".join(step_to_text(step) for step in rank) + "\n" for rank in self.steps
        )

    @classmethod
    def from_csv(cls, text: str, kind: str = "csv") -> Schedule:
        r"""Reads `to_csv`'s format; empty cells (idle in torch's tables) are skipped.

        Args:
          text: one row a rank, cells such as `0F3`, `2I0`, `2W0`, `1B2` or
            `(0F3;7B1)OVERLAP_F_B`.
          kind: the name that the schedule gets.

        Raises:
          ValueError: a cell cannot be read, or the table is not a valid schedule.

        Examples:
          >>> print(Schedule.from_csv("0F0,,,0B0\n,1F0,1B0").to_csv(), end="")
          0F0,0B0
          1F0,1B0
        """
        steps = tuple(
            tuple(_step_from_text(cell.strip(), rank) for cell in row if cell.strip())
            for rank, row in enumerate(csv.reader(text.rstrip().splitlines()))
        )
        tasks = [task for rank in steps for step in rank for task in step]
        if not tasks:
            raise ValueError(
                f"{text=} holds no task; write one row a rank with cells such as 0F0."
            )
        return cls(
            kind=kind,
            num_ranks=len(steps),
            num_stages=1 + max(task.stage for task in tasks),
            num_microbatches=1 + max(task.microbatch for task in tasks),
            steps=steps,
        )

    def _repr_html_(self) -> str:
        # Data must not depend on pictures: only a notebook that asks loads them.
        from dualpipe_jax import show

        return show.html_fragment(self)


def predecessors(task: Task, schedule: Schedule) -> list[Task]:
    """The tasks whose results `task` needs, as op F, I or B (never both of the last).

    A full B stands for its I: what consumes an input cotangent may have been fed
    by either, and the caller looks up whichever the schedule holds.
    """
    op, stage, microbatch = task
    if op == "F":
        return [Task("F", stage - 1, microbatch)] if stage else []
    if op == "W":
        return [Task("I", stage, microbatch)]
    needs = [Task("F", stage, microbatch)]
    if stage + 1 < schedule.num_stages:
        needs.append(Task("I", stage + 1, microbatch))
    return needs


def result_of(task: Task) -> Task:
    """What `predecessors` calls a task's result: a full B gives what an I gives."""
    return task._replace(op="I") if task.op == "B" else task


def step_to_text(step: Step) -> str:
    """One cell of the CSV: `0F3`, or `(0F3;7B1)OVERLAP_F_B`."""
    if len(step) == 1:
        return str(step[0])
    return f"({step[0]};{step[1]})OVERLAP_F_B"


def check_size(name: str, value: int, minimum: int = 1) -> int:
    """Returns `value` as a plain int, or says what is wrong with it."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be an integer.") from None
    if value < minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}.")
    return value


def _step_from_text(cell: str, rank: int) -> Step:
    pair = _PAIR.fullmatch(cell)
    names = pair.groups() if pair else (cell,)
    tasks = []
    for name in names:
        match = _TASK.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{cell=} of rank {rank} is not a step; write cells such as 0F3, "
                "2I0, 2W0, 1B2 or (0F3;7B1)OVERLAP_F_B."
            )
        tasks.append(Task(match[2], int(match[1]), int(match[3])))
    return tuple(tasks)


def _directions_along(route: Sequence[int]) -> tuple[int, ...]:
    """Direction of each stage, given the rank that holds it."""
    directions: list[int] = []
    heading = 0  # 1 up, -1 down, 0 as long as the run has a single rank
    for stage, rank in enumerate(route):
        move = (rank > route[stage - 1]) - (rank < route[stage - 1]) if stage else 0
        if stage == 0:
            following = route[1] if len(route) > 1 else rank
            directions.append(int(following < rank))
        elif move == 0 or move == -heading:
            directions.append(1 - directions[-1])
            heading = 0
        else:
            directions.append(directions[-1])
            heading = move
    return tuple(directions)


def _check_shape(schedule: Schedule) -> None:
    for name in ("num_ranks", "num_stages", "num_microbatches"):
        check_size(name, getattr(schedule, name))
    if len(schedule.steps) != schedule.num_ranks:
        raise ValueError(
            f"steps has {len(schedule.steps)} rows, but "
            f"num_ranks={schedule.num_ranks}; give one row a rank."
        )
    for rank, steps in enumerate(schedule.steps):
        if not steps:
            raise ValueError(f"Rank {rank} has no step; leave out ranks without work.")


def _check_steps(schedule: Schedule) -> dict[Task, tuple[int, int]]:
    """Checks each step on its own; returns (rank, position) of every task."""
    where: dict[Task, tuple[int, int]] = {}
    owners: dict[tuple[int, int], int] = {}
    for rank, position, step in schedule:
        ops = tuple(task.op for task in step)
        if len(step) not in (1, 2) or (len(step) == 2 and ops != ("F", "B")):
            raise ValueError(
                f"{step=} of rank {rank} is neither one task nor an overlapped pair "
                "(F, B)."
            )
        if len(step) == 2 and step[0].microbatch == step[1].microbatch:
            raise ValueError(
                f"{step=} of rank {rank} overlaps a microbatch with itself; its B "
                "needs its F first."
            )
        for task in step:
            if (
                task.op not in OPS
                or not 0 <= task.stage < schedule.num_stages
                or not 0 <= task.microbatch < schedule.num_microbatches
            ):
                raise ValueError(
                    f"{task=} of rank {rank} is unknown: op must be one of {OPS}, "
                    f"stage below {schedule.num_stages}, microbatch below "
                    f"{schedule.num_microbatches}."
                )
            if task in where:
                raise ValueError(f"{task} stands twice; run each task exactly once.")
            owner = owners.setdefault((task.stage, task.microbatch), rank)
            if owner != rank:
                raise ValueError(
                    f"{task} runs on rank {rank}, but rank {owner} holds stage "
                    f"{task.stage} for microbatch {task.microbatch}; keep all tasks "
                    "of one stage and microbatch on one rank."
                )
            where[task] = (rank, position)
    return where


def _check_complete(schedule: Schedule, where: dict[Task, tuple[int, int]]) -> None:
    forward_only = schedule.is_forward_only
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            at = {
                op: where[task]
                for op in OPS
                if (task := Task(op, stage, microbatch)) in where
            }
            name = f"Stage {stage}, microbatch {microbatch}"
            if "F" not in at:
                raise ValueError(f"{name} has no F; add {stage}F{microbatch}.")
            if forward_only:
                continue
            if set(at) not in ({"F", "B"}, {"F", "I", "W"}):
                has = ", ".join(op for op in "BIW" if op in at) or "none of them"
                raise ValueError(
                    f"{name} must have either one B, or one I and one W; has {has}."
                )
            if at["F"] > at.get("B", at.get("I", at["F"])):
                raise ValueError(f"{name} runs backward before its F; move F earlier.")
            if "W" in at and at["I"] > at["W"]:
                raise ValueError(f"{name} runs W before its I; move I earlier.")


def _dependency_order(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    order: list[tuple[int, int]] = []
    done: set[Task] = set()
    waiting: dict[Task, list[int]] = {}
    position = [0] * schedule.num_ranks
    awake = deque(range(schedule.num_ranks))
    while awake:
        rank = awake.popleft()
        while position[rank] < len(schedule.steps[rank]):
            step = schedule.steps[rank][position[rank]]
            needs = (need for task in step for need in predecessors(task, schedule))
            missing = next((need for need in needs if need not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            order.append((rank, position[rank]))
            position[rank] += 1
            for result in map(result_of, step):
                done.add(result)
                awake.extend(waiting.pop(result, ()))
    if waiting:
        waits = ", ".join(
            f"rank {rank} at {step_to_text(schedule.steps[rank][position[rank]])} "
            f"waits for {'the backward' if need.op == 'I' else 'the forward'} of "
            f"stage {need.stage}, microbatch {need.microbatch}"
            for need, ranks in waiting.items()
            for rank in ranks
        )
        raise ValueError(f"The schedule deadlocks: {waits}; reorder these steps.")
    return tuple(order)
