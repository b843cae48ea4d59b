"""A schedule's steps as text: torch's CSV, and JSON."""

from __future__ import annotations

import csv
import json
from typing import Any

from dualpipe_jax.schedules.tasks import (
    Step,
    StepTable,
    step_from_text,
    step_to_text,
)

_SIZES = ("num_ranks", "num_stages", "num_microbatches")


def to_cells(schedule: StepTable) -> list[list[str]]:
    """Returns each rank's steps as cells such as `0F3`."""
    return [[step_to_text(step) for step in own] for own in schedule.steps]


def steps_from_csv(text: str) -> tuple[tuple[Step, ...], ...]:
    """Reads rows of cells, without those that are empty or only communicate.

    Raises:
      ValueError: a cell cannot be read, or there is no task.
    """
    rows = csv.reader(
        text.removeprefix("\ufeff").rstrip().splitlines(), skipinitialspace=True
    )
    steps = tuple(_read_row(row, rank) for rank, row in enumerate(rows))
    if not any(steps):
        raise ValueError(
            f"{text=:.100} holds no task; write one row per rank with cells such as "
            "0F0."
        )
    return steps


def to_json(kind: str, schedule: StepTable) -> str:
    """Writes one row of cells per rank, and the schedule's name and sizes."""
    fields = {"kind": kind} | {name: getattr(schedule, name) for name in _SIZES}
    head = json.dumps(fields)[:-1]
    rows = ",\n".join(json.dumps(cells) for cells in to_cells(schedule))
    return f'{head},\n"steps": [\n{rows}\n]}}\n'


def fields_from_json(text: str) -> dict[str, Any]:
    """Reads what `to_json` writes, as arguments of `Schedule`.

    Raises:
      ValueError: the text is not JSON, a field is missing or unknown, or a cell cannot
        be read.
    """
    try:
        fields = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{text=:.100} is not JSON ({error}); pass what to_json writes."
        ) from None
    names = ("kind", *_SIZES, "steps")
    if not isinstance(fields, dict) or set(fields) != set(names):
        found = ", ".join(map(str, fields)) if isinstance(fields, dict) else "none"
        raise ValueError(
            f"A schedule's JSON has the fields {', '.join(names)}, but this one has "
            f"{found:.100}; write one with to_json, or with --format json."
        )
    rows = fields["steps"]
    if not isinstance(fields["kind"], str) or not _is_table(rows):
        raise ValueError(
            'kind must be a string, and steps a list of cells such as "0F3" per rank; '
            "write them with to_json, or with --format json."
        )
    steps = tuple(_read_row(row, rank) for rank, row in enumerate(rows))
    return fields | {"steps": steps}


def _read_row(row: list[str], rank: int) -> tuple[Step, ...]:
    cells = (cell.strip() for cell in row)
    steps = (step_from_text(cell, rank) for cell in cells if cell)
    return tuple(step for step in steps if step)


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and all(isinstance(cell, str) for cell in row)
        for row in rows
    )
