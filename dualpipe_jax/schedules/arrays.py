"""A schedule as flat arrays, for passes over all of its tasks.

Steps are numbered rank by rank, in each rank's order.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from dualpipe_jax.schedules.tasks import OPS, StepTable

F, B, I, W = range(len(OPS))
FB = len(OPS)
_CODES = {op: code for code, op in enumerate(OPS)}


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduleArrays:
    """All steps and tasks of a schedule.

    Attributes:
      first: [num_ranks + 1] each rank's first step; the last entry: number of steps.
      rank: [steps] of each step.
      op: [tasks] `F`, `B`, `I` or `W`, in the order of steps, and in a step.
      stage: [tasks].
      microbatch: [tasks].
      step: [tasks] that each task is in.
      made: [4, stages, microbatches] the step that makes a task's result, under the op
        F, I (of a B, too) or W; -1: none.
    """

    first: np.ndarray
    rank: np.ndarray
    op: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    step: np.ndarray
    made: np.ndarray

    @classmethod
    def of(cls, schedule: StepTable) -> ScheduleArrays:
        """Reads a schedule whose tasks are complete."""
        steps = [step for own in schedule.steps for step in own]
        tasks = np.array(
            [(_CODES[op], stage, m) for step in steps for op, stage, m in step],
            np.int32,
        )
        op, stage, microbatch = tasks.T
        step = np.repeat(np.arange(len(steps)), [len(step) for step in steps])
        lengths = [len(own) for own in schedule.steps]
        made = np.full(
            (len(OPS), schedule.num_stages, schedule.num_microbatches), -1, np.int64
        )
        made[np.where(op == B, I, op), stage, microbatch] = step
        first = np.concatenate([[0], np.cumsum(lengths)])
        return cls(
            first=first,
            rank=np.repeat(np.arange(len(lengths)), lengths),
            op=op,
            stage=stage,
            microbatch=microbatch,
            step=step,
            made=made,
        )

    @functools.cached_property
    def first_task(self) -> np.ndarray:
        """[steps] the first task of each."""
        return np.searchsorted(self.step, np.arange(len(self.rank)))

    @functools.cached_property
    def kind(self) -> np.ndarray:
        """[steps] the op of a single task, `FB` for a pair."""
        return np.where(np.bincount(self.step) == 2, FB, self.op[self.first_task])

    @functools.cached_property
    def passed(self) -> np.ndarray:
        """[tasks] the step whose result arrives from another stage; -1: none."""
        last = self.made.shape[1] - 1
        is_forward, is_backward = self.op == F, (self.op == B) | (self.op == I)
        gets = (is_forward & (self.stage > 0)) | (is_backward & (self.stage < last))
        other = np.where(is_forward, self.stage - 1, np.minimum(self.stage + 1, last))
        found = self.made[np.where(is_forward, F, I), other, self.microbatch]
        return np.where(gets, found, -1)

    @functools.cached_property
    def awaited(self) -> np.ndarray:
        """[2, steps] the steps whose results arrive for a step's tasks; -1: none.

        What a task needs of its own stage, its rank has done before.
        """
        second = np.where(self.kind == FB, self.first_task + 1, self.first_task)
        return self.passed[np.stack([self.first_task, second])]
