"""The record of a run: metrics.jsonl, one object per step, and the loss curve."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from eplb_jax import style


class MetricsLog:
    """Appends one JSON object per step to a file, without buffering.

    Numbers that are not finite are written as null. A kill at any moment loses at most
    the line being written, which `read_metrics` leaves out. Records that cannot be
    written, as on a full disk, are kept and tried again with the next one.

    Args:
      path: the file.
      keep_until: records of later steps are dropped; a run that resumes from step
        n writes them again.

    Examples:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> with MetricsLog(path) as log:
      ...     log.write({"step": 1, "loss": 5.5, "grad_norm": float("nan")})
      >>> read_metrics(path)
      [{'step': 1, 'loss': 5.5, 'grad_norm': None}]
    """

    def __init__(self, path: Path, keep_until: int = 0):
        kept = []
        if keep_until and path.exists():
            kept = [r for r in read_metrics(path) if r["step"] <= keep_until]
        # Replaced in one go: a kill here must not cost the records of before.
        aside = path.with_name(path.name + ".new")
        aside.write_text("".join(map(_line, kept)))
        aside.replace(path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self._flush()
        self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        self._unwritten += _line(record).encode()
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(OSError):
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]


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
