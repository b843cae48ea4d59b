"""The notation of the algorithms: phases of repeated steps.

A published schedule is a short table per rank: "n times F0 F1, then m times
I1 W F1, ...". `unroll` turns such a table into steps, so each algorithm's file is
little more than its table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dualpipe_jax.schedules.schedule import Step, Task

Phase = tuple[int, str]


def unroll(
    phases: Iterable[Phase],
    stages: Sequence[int],
    first_microbatches: Sequence[int] = (0, 0),
) -> tuple[Step, ...]:
    """Expands one rank's phases into steps.

    Each word takes the next microbatch of its direction; a W belongs to the oldest I
    without one, of either direction or of its own.

    Args:
      phases: pairs (times, words). A word is `F0`, `B1`, `I0` or `W1`: op and
        direction; `W`, of either; or an overlapped pair such as `F0&B1`.
      stages: the logical stage that this rank holds, by direction.
      first_microbatches: number of each direction's first microbatch.

    Examples:
      >>> steps = unroll([(2, "F0"), (1, "I0 W")], stages=[3])
      >>> [str(task) for step in steps for task in step]
      ['3F0', '3F1', '3I0', '3W0']
    """
    started: Counter[tuple[bool, int]] = Counter()
    without_w: list[Task] = []

    def task(word: str) -> Task:
        if word[0] == "W":
            of = stages if word == "W" else (stages[int(word[1])],)
            oldest = next(task for task in without_w if task.stage in of)
            without_w.remove(oldest)
            return oldest._replace(op="W")
        op, direction = word[0], int(word[1])
        counter = (op == "F", direction)
        index = first_microbatches[direction] + started[counter]
        started[counter] += 1
        made = Task(op, stages[direction], index)
        if op == "I":
            without_w.append(made)
        return made

    return tuple(
        tuple(task(word) for word in step.split("&"))
        for times, words in phases
        for _ in range(times)
        for step in words.split()
    )
