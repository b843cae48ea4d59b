"""Checks that a table of steps is a schedule that can run."""

from __future__ import annotations

import operator
from collections import Counter, deque

from dualpipe_jax.schedules.arrays import ScheduleArrays
from dualpipe_jax.schedules.tasks import (
    OPS,
    StepTable,
    Task,
    predecessors,
    result_of,
    step_to_text,
)


def check_size(name: str, value: int, minimum: int = 1) -> int:
    """Returns `value` as a plain int; raises a ValueError if it is not a valid size."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be an integer.") from None
    if value < minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}.")
    return value


def check_shape(schedule: StepTable) -> None:
    """Checks the sizes, and that every rank has a step."""
    for name in ("num_ranks", "num_stages", "num_microbatches"):
        check_size(name, getattr(schedule, name))
    if len(schedule.steps) != schedule.num_ranks:
        raise ValueError(
            f"steps has {len(schedule.steps)} rows, but "
            f"num_ranks={schedule.num_ranks}; give one row per rank."
        )
    for rank, steps in enumerate(schedule.steps):
        if not steps:
            raise ValueError(f"Rank {rank} has no step; leave out ranks without work.")


def check_steps(schedule: StepTable) -> dict[Task, tuple[int, int]]:
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
                raise ValueError(f"{task} appears twice; run each task exactly once.")
            owner = owners.setdefault((task.stage, task.microbatch), rank)
            if owner != rank:
                raise ValueError(
                    f"{task} runs on rank {rank}, but rank {owner} holds stage "
                    f"{task.stage} for microbatch {task.microbatch}; keep all tasks "
                    "of one stage and microbatch on one rank."
                )
            where[task] = (rank, position)
    return where


def check_complete(schedule: StepTable, where: dict[Task, tuple[int, int]]) -> None:
    """Checks that every stage runs all tasks of every microbatch, in a legal order."""
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


def dependency_order(
    schedule: StepTable, arrays: ScheduleArrays
) -> tuple[tuple[int, int], ...]:
    """Returns (rank, position) of every step, each after those that it depends on.

    Takes linear time: a rank that must wait is visited again only when its input is
    done. If ranks still wait when none can go on, they deadlock.

    Args:
      schedule: of steps that `check_complete` has found in order on each rank.
      arrays: of the schedule.
    """
    order: list[tuple[int, int]] = []
    first, (one, two) = arrays.first.tolist(), arrays.awaited.tolist()
    done = bytearray(len(one) + 1)
    done[-1] = True  # for what there is no need to wait for
    waiting: dict[int, list[int]] = {}
    following = first[:-1]
    awake = deque(range(schedule.num_ranks))
    while awake:
        rank = awake.popleft()
        for step in range(following[rank], first[rank + 1]):
            missing = two[step] if done[one[step]] else one[step]
            if not done[missing]:
                waiting.setdefault(missing, []).append(rank)
                break
            order.append((rank, step - first[rank]))
            following[rank], done[step] = step + 1, True
            if step in waiting:
                awake.extend(waiting.pop(step))
    if waiting:
        blocked = [rank for ranks in waiting.values() for rank in ranks]
        raise ValueError(_deadlock(schedule, order, blocked))
    return tuple(order)


def _deadlock(
    schedule: StepTable, order: list[tuple[int, int]], blocked: list[int]
) -> str:
    """Says what the ranks wait for that are blocked after the steps of `order`."""
    num_done = Counter(rank for rank, _ in order)
    done = {
        result_of(task)
        for rank, position in order
        for task in schedule.steps[rank][position]
    }
    waits = []
    for rank in blocked:
        step = schedule.steps[rank][num_done[rank]]
        needs = (need for task in step for need in predecessors(task, schedule))
        need = next(need for need in needs if need not in done)
        waits.append(
            f"rank {rank} at {step_to_text(step)} waits for "
            f"{'the backward' if need.op == 'I' else 'the forward'} of stage "
            f"{need.stage}, microbatch {need.microbatch}"
        )
    return f"The schedule deadlocks: {', '.join(waits)}; reorder these steps."
