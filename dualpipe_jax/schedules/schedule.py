"""A pipeline schedule as data: which rank runs which task, in which order.

A `Schedule` is a frozen table that validates itself. Generators (one algorithm per
file) only build such tables; one simulator, one lowering and one executor serve all of
them. Nothing here imports jax, so a schedule can be studied anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from dualpipe_jax.schedules import formats as _formats, validate as _validate
from dualpipe_jax.schedules.arrays import ScheduleArrays
from dualpipe_jax.schedules.tasks import (
    OPS,
    Step,
    Task,
    predecessors,
    result_of,
    step_to_text,
)
from dualpipe_jax.schedules.validate import check_size
from eplb_jax import lookup

__all__ = [
    "OPS",
    "Schedule",
    "Step",
    "Task",
    "check_size",
    "predecessors",
    "result_of",
    "step_to_text",
]


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """What every rank does, in order.

    A notebook displays a schedule as a picture, simulated at unit costs.

    Attributes:
      kind: name of the algorithm, for example `"dualpipe"`.
      num_ranks: size of the pipeline mesh axis.
      num_stages: number of logical stages.
      num_microbatches: microbatches of one training step, both directions.
      steps: for each rank a tuple of steps; a step is a tuple of one `Task`, or
        of two (an F and a B of different microbatches) executed together so that
        each hides the other's communication.

    Raises:
      ValueError: a rank has no step; a task is missing, unknown or done twice; an F
        comes after its B, or an I after its W; one (stage, microbatch) is spread over
        several ranks; only part of a schedule is forward-only; or ranks deadlock.

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
        _validate.check_shape(self)
        _validate.check_complete(self, _validate.check_steps(self))
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
        """Whether the schedule consists of F tasks only."""
        return all(task.op == "F" for _, _, step in self for task in step)

    def with_whole_backwards(self, *, max_waiting: int = 0) -> Schedule:
        """Returns the same order with I and its W as one B, where memory needs it.

        Nothing is kept from I to W then: that memory is saved (for DualPipe, of P / 2
        microbatches), and the bubbles that W would fill are back.

        Args:
          max_waiting: most microbatches of a rank between I and W at a time; they stay
            apart, and fill bubbles. 0: all backwards are whole.

        Raises:
          ValueError: `max_waiting` is negative.

        Examples:
          >>> schedule = Schedule.from_csv("0F0,0I0,0W0", kind="mine")
          >>> print(schedule.with_whole_backwards().to_csv())
          0F0,0B0
          >>> schedule.with_whole_backwards(max_waiting=1) == schedule
          True
        """
        if max_waiting < 0:
            raise ValueError(f"{max_waiting=} must be at least 0.")
        steps = tuple(tuple(_joined(own, max_waiting)) for own in self.steps)
        return dataclasses.replace(self, steps=steps)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """Returns the rank that holds `stage` for `microbatch`."""
        return self._owners[stage, microbatch]

    def direction_of(self, stage: int, microbatch: int) -> int:
        """Returns the direction, 0 or 1, in which a microbatch passes a stage.

        A microbatch visits the ranks in runs, upwards or downwards; a new run begins
        where the stages turn (DualPipeV) or wrap around (interleaved schedules). Runs
        alternate between directions 0 and 1, and the first is 0 if it goes upwards:
        DualPipe's two directions, DualPipeV's two phases.

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
    def arrays(self) -> ScheduleArrays:
        """All steps and tasks as arrays."""
        return ScheduleArrays.of(self)

    @functools.cached_property
    def dependency_order(self) -> tuple[tuple[int, int], ...]:
        """(rank, position) of every step, each after the steps that it depends on."""
        return _validate.dependency_order(self, self.arrays)

    def forward_only(self) -> Schedule:
        """Returns the same order with its F tasks only, for inference."""
        steps = tuple(
            tuple((task,) for step in rank for task in step if task.op == "F")
            for rank in self.steps
        )
        return dataclasses.replace(self, kind=f"{self.kind}_forward", steps=steps)

    def to_csv(self) -> str:
        """Returns the compute-only CSV of torch.distributed.pipelining, a row per rank.

        An overlapped pair is written `(0F3;7B1)OVERLAP_F_B`.
        """
        return "".join(",".join(cells) + "\n" for cells in _formats.to_cells(self))

    @classmethod
    def from_csv(cls, text: str, kind: str = "csv") -> Schedule:
        r"""Reads `to_csv`'s format, and torch's tables with communication.

        Args:
          text: one row per rank, with cells such as `0F3`, `2I0`, `2W0`, `1B2` or
            `(0F3;7B1)OVERLAP_F_B`. Skipped are empty cells (idle in torch's tables),
            messages such as `0SEND_F1` and `1RECV_B0`, and the collectives `0UNSHARD`,
            `0RESHARD` and `0REDUCE_GRAD`.
          kind: the schedule's name.

        Raises:
          ValueError: a cell cannot be read, or the table is not a valid schedule.

        Examples:
          >>> print(Schedule.from_csv("0F0,,,0B0\n,1F0,1B0").to_csv(), end="")
          0F0,0B0
          1F0,1B0
          >>> print(Schedule.from_csv("0UNSHARD,0F0,0B0,0REDUCE_GRAD").to_csv(), end="")
          0F0,0B0
        """
        steps = _formats.steps_from_csv(text)
        tasks = [task for rank in steps for step in rank for task in step]
        return cls(
            kind=kind,
            num_ranks=len(steps),
            num_stages=1 + max(task.stage for task in tasks),
            num_microbatches=1 + max(task.microbatch for task in tasks),
            steps=steps,
        )

    def to_json(self) -> str:
        """Returns the schedule as JSON: name, sizes and a row of cells per rank.

        Examples:
          >>> print(Schedule.from_csv("0F0,0B0", kind="mine").to_json(), end="")
          {"kind": "mine", "num_ranks": 1, "num_stages": 1, "num_microbatches": 1,
          "steps": [
          ["0F0", "0B0"]
          ]}
        """
        return _formats.to_json(self.kind, self)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Reads what `to_json` writes.

        Raises:
          ValueError: the text is not JSON, a field is missing or unknown, a cell cannot
            be read, or the table is not a valid schedule.

        Examples:
          >>> schedule = Schedule.from_csv("0F0,0B0", kind="mine")
          >>> Schedule.from_json(schedule.to_json()) == schedule
          True
        """
        return cls(**_formats.fields_from_json(text))

    _repr_html_ = lookup.method("dualpipe_jax.pictures.show:html_fragment")


def _directions_along(route: Sequence[int]) -> tuple[int, ...]:
    """Returns the direction of each stage, given the rank that holds it."""
    directions: list[int] = []
    heading = 0  # 1 up, -1 down, 0 while the run has a single rank
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


def _joined(own: Sequence[Step], max_waiting: int) -> Iterator[Step]:
    """Yields a rank's steps with I and W joined where too many would wait for W."""
    waiting: set[tuple[int, int]] = set()
    for step in own:
        tasks = []
        for task in step:
            backward = task.stage, task.microbatch
            if task.op == "W":
                if backward not in waiting:
                    continue  # it is a part of the B
                waiting.remove(backward)
            elif task.op == "I":
                if len(waiting) < max_waiting:
                    waiting.add(backward)
                else:
                    task = task._replace(op="B")
            tasks.append(task)
        if tasks:
            yield tuple(tasks)
