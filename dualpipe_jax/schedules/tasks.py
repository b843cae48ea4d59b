"""Tasks and steps, the elements of a schedule, and what a task depends on.

One cell of torch.distributed.pipelining's CSV is one step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

OPS = ("F", "B", "I", "W")

_TASK = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\(\s*(\d+[FBIW]\d+)\s*;\s*(\d+[FBIW]\d+)\s*\)\s*OVERLAP_F_B")
# The executor's permutes, and FSDP's collectives, follow from the tasks.
_COMMUNICATION = re.compile(
    r"\d+((SEND|RECV)_[FB]\d+|(UNSHARD|RESHARD|REDUCE_GRAD)\d*)"
)


class Task(NamedTuple):
    """One unit of work: an operation of one stage on one microbatch.

    Attributes:
      op: `"F"` forward, `"B"` full backward, `"I"` backward for input only,
        `"W"` backward for weights only; a B is an I and a W together.
      stage: logical stage; 0 is the first slice of the model.
      microbatch: its number, counted over both directions.

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


class StepTable(Protocol):
    """What a `Schedule` holds before it is validated."""

    @property
    def num_ranks(self) -> int: ...

    @property
    def num_stages(self) -> int: ...

    @property
    def num_microbatches(self) -> int: ...

    @property
    def steps(self) -> tuple[tuple[Step, ...], ...]: ...

    @property
    def is_forward_only(self) -> bool: ...

    def __iter__(self) -> Iterator[tuple[int, int, Step]]:
        """Yields (rank, position, step)."""
        ...


def predecessors(task: Task, schedule: StepTable) -> list[Task]:
    r"""Returns the tasks whose results `task` needs, as op F or I.

    An input cotangent may come from an I or from a full B. Both are called I here, as
    in `result_of`; look results up by that name.

    Examples:
      >>> from dualpipe_jax.schedules.schedule import Schedule
      >>> schedule = Schedule.from_csv("0F0,0B0\n1F0,1B0")
      >>> [str(need) for need in predecessors(Task("B", 0, 0), schedule)]
      ['0F0', '1I0']
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
    """Returns the name of a task's result in `predecessors`: I for a full B."""
    return task._replace(op="I") if task.op == "B" else task


def step_to_text(step: Step) -> str:
    """Writes a cell of the CSV: `0F3`, or `(0F3;7B1)OVERLAP_F_B`."""
    if len(step) == 1:
        return str(step[0])
    return f"({step[0]};{step[1]})OVERLAP_F_B"


def step_from_text(cell: str, rank: int) -> Step:
    """Reads a cell of the CSV; `rank` is its row, named in the error.

    Returns:
      One task, an overlapped pair, or nothing for a cell that only communicates.

    Raises:
      ValueError: the cell is none of these.
    """
    if _COMMUNICATION.fullmatch(cell):
        return ()
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
