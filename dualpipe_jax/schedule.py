"""A pipeline schedule as data: which rank runs which task, in which order.

A `Schedule` is a frozen table that validates itself. Generators (one algorithm
a file) only build such tables; one simulator, one lowering and one executor
serve all of them. Nothing here imports jax, so a schedule can be studied
anywhere.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
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


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What every rank does, in order.

    Attributes:
      kind: name of the algorithm, such as `"dualpipe"`.
      num_ranks: size of the pipeline mesh axis.
      num_stages: number of logical stages.
      num_microbatches: microbatches of one training step, both directions.
      steps: for each rank a tuple of steps; a step is a tuple of one `Task`, or
        of two (an F and a B of different microbatches) executed together so that
        each hides the other's communication.

    Raises:
      ValueError: a task is missing, done twice or unknown, an F stands after its
        B, an I after its W, one (stage, microbatch) is spread over several ranks,
        a schedule is part forward-only, or ranks wait for each other for ever.

    Examples:
      >>> schedule = Schedule.from_csv("0F0,0B0", kind="mine")
      >>> schedule.num_stages, schedule.num_microbatches
      (1, 1)
    """

    kind: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    steps: tuple[tuple[Step, ...], ...]

    def __post_init__(self):
        _validate(self)

    def __iter__(self) -> Iterator[tuple[int, int, Step]]:
        """Yields (rank, position in the rank's order, step)."""
        for rank, steps in enumerate(self.steps):
            for position, step in enumerate(steps):
                yield rank, position, step

    @property
    def is_forward_only(self) -> bool:
        return all(task.op == "F" for _, _, step in self for task in step)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that holds `stage` for `microbatch`."""
        return self._owners[stage, microbatch]

    @property
    def _owners(self) -> dict[tuple[int, int], int]:
        owners = self.__dict__.get("_owners_cache")
        if owners is None:
            owners = {
                (task.stage, task.microbatch): rank
                for rank, _, step in self
                for task in step
            }
            object.__setattr__(self, "_owners_cache", owners)
        return owners

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
            ",".join(_step_to_text(step) for step in rank) + "\n" for rank in self.steps
        )

    @classmethod
    def from_csv(cls, text: str, kind: str = "csv") -> Schedule:
        """Reads `to_csv`'s format; empty cells (idle in torch's tables) are skipped.

        Args:
          text: one row a rank, cells such as `0F3`, `2I0`, `2W0`, `1B2` or
            `(0F3;7B1)OVERLAP_F_B`.
          kind: the name that the schedule gets.

        Raises:
          ValueError: a cell cannot be read, or the table is not a valid schedule.
        """
        rows = text.strip("\n").split("\n") if text.strip() else []
        if not rows:
            raise ValueError(f"{text=} holds no row; write one row a rank.")
        steps = tuple(
            tuple(
                _step_from_text(cell.strip(), rank)
                for cell in row.split(",")
                if cell.strip()
            )
            for rank, row in enumerate(rows)
        )
        tasks = [task for rank in steps for step in rank for task in step]
        if not tasks:
            raise ValueError("The CSV holds no task; write cells such as 0F0.")
        return cls(
            kind=kind,
            num_ranks=len(steps),
            num_stages=1 + max(task.stage for task in tasks),
            num_microbatches=1 + max(task.microbatch for task in tasks),
            steps=steps,
        )


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


def _step_to_text(step: Step) -> str:
    if len(step) == 1:
        return str(step[0])
    return f"({step[0]};{step[1]})OVERLAP_F_B"


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


def _validate(schedule: Schedule) -> None:
    for name in ("num_ranks", "num_stages", "num_microbatches"):
        value = getattr(schedule, name)
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if len(schedule.steps) != schedule.num_ranks:
        raise ValueError(
            f"steps has {len(schedule.steps)} rows, but "
            f"num_ranks={schedule.num_ranks}; give one row a rank."
        )
    where = _check_steps(schedule)
    _check_complete(schedule, where)
    _check_no_deadlock(schedule)


def _check_steps(schedule: Schedule) -> dict[Task, tuple[int, int]]:
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
            f, b, i, w = (where.get(Task(op, stage, microbatch)) for op in OPS)
            name = f"stage {stage}, microbatch {microbatch}"
            if f is None:
                raise ValueError(f"{name} has no F; add {stage}F{microbatch}.")
            if forward_only:
                continue
            if (b is None) == (i is None) or (i is None) != (w is None):
                raise ValueError(
                    f"{name} must have either one B, or one I and one W; has "
                    f"{', '.join(op for op, at in zip('BIW', (b, i, w), strict=True) if at) or 'none'}."
                )
            first = b or i
            assert first is not None
            if first <= f:
                raise ValueError(f"{name} runs backward before its F; move F earlier.")
            if i is not None and w is not None and w <= i:
                raise ValueError(f"{name} runs W before its I; move I earlier.")


def _check_no_deadlock(schedule: Schedule) -> None:
    done: set[Task] = set()
    position = [0] * schedule.num_ranks
    progress = True
    while progress:
        progress = False
        for rank, steps in enumerate(schedule.steps):
            while position[rank] < len(steps):
                step = steps[position[rank]]
                needs = {need for task in step for need in predecessors(task, schedule)}
                if not needs <= done:
                    break
                # A full B gives what an I gives.
                done.update(task._replace(op="I") if task.op == "B" else task for task in step)
                position[rank] += 1
                progress = True
    stuck = {
        rank: _step_to_text(steps[position[rank]])
        for rank, steps in enumerate(schedule.steps)
        if position[rank] < len(steps)
    }
    if stuck:
        waits = ", ".join(f"rank {rank} at {step}" for rank, step in stuck.items())
        raise ValueError(
            f"The schedule deadlocks: {waits} wait for each other; reorder these steps."
        )
