"""The record of a run: metrics.jsonl, one object per step, and the loss curve."""

from __future__ import annotations

import collections
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from dualpipe_jax.files import replace_text
from eplb_jax import style


class MetricsLog:
    """Appends one JSON object per step to a file, without buffering.

    Numbers that are not finite are written as null. A kill at any moment loses at most
    the line being written, which `read_metrics` leaves out. Records that cannot be
    written, as on a full disk, are kept and tried again with the next one, and when the
    log is closed.

    Args:
      path: the file.
      keep_until: records of later steps are dropped; a run that resumes from step
        n writes them again.

    Attributes:
      gap: steps up to `keep_until` that have no record, in words; or empty.
      failure: why the last record could not be written, or None.

    Examples:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> with MetricsLog(path) as log:
      ...     log.write({"step": 1, "loss": 5.5, "grad_norm": float("nan")})
      >>> log.records()
      [{'step': 1, 'loss': 5.5, 'grad_norm': None}]
      >>> MetricsLog(path, keep_until=4).gap
      '2 to 4'
    """

    def __init__(self, path: Path, keep_until: int = 0):
        kept = []
        if keep_until and path.exists():
            kept = [r for r in read_metrics(path) if r["step"] <= keep_until]
        self.gap = _ranges(set(range(1, keep_until + 1)) - {r["step"] for r in kept})
        self.failure: str | None = None
        # At once: a kill here must not cost the records of before.
        replace_text(path, "".join(map(_line, kept)))
        self._path, self._size = path, path.stat().st_size
        self._pending: collections.deque[bytes] = collections.deque()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self._flush()

    @property
    def num_unwritten(self) -> int:
        """How many records are not in the file."""
        return len(self._pending)

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record, and those before it that could not be written."""
        self._pending.append(_line(record).encode())
        self._flush()

    def records(self) -> list[dict[str, Any]]:
        """All records: those in the file, and those that could not be written."""
        written = read_metrics(self._path) if self._path.exists() else []
        return [*written, *map(json.loads, self._pending)]

    def _flush(self) -> None:
        self.failure = None
        if not self._pending:
            return
        try:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(self._size)  # behind the last whole line
                while self._pending:
                    line = self._pending[0]
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._size += len(line)
                    self._pending.popleft()
        except OSError as error:
            self.failure = str(error)


def _ranges(steps: set[int]) -> str:
    """Numbers in words.

    Examples:
      >>> _ranges({3, 4, 5, 8})
      '3 to 5, 8'
    """
    starts = sorted(step for step in steps if step - 1 not in steps)
    ends = sorted(step for step in steps if step + 1 not in steps)
    return ", ".join(
        f"{start} to {end}" if start < end else str(start)
        for start, end in zip(starts, ends, strict=True)
    )


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_strict(record), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """The same with None, JSON's null, for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off is left out.

    What was not finite is None.
    """
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_loss(records: list[dict[str, Any]], path: Path, *, unit: str = "byte") -> None:
    """Draws the loss of every step and the held-out losses into an image file."""
    figure = style.figure(7, 4)
    (axes,) = style.axes(figure, grid="both")
    axes.plot(*_series(records, "loss"), label="train", color=style.BLUE, linewidth=1)
    axes.plot(
        *_series(records, "held_out_loss"),
        label="held out",
        color=style.VERMILION,
        marker="o",
        markersize=4,
    )
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, nats per {unit}")
    axes.set_ylim(bottom=0)
    style.legend(axes)
    figure.savefig(path, dpi=150)


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    having = [record for record in records if record.get(name) is not None]
    return [r["step"] for r in having], [r[name] for r in having]
