"""A training run as one page of HTML: RUN/report.html, written while it trains."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualpipe_jax.train import page as _page, report_overlap as _report_overlap
from dualpipe_jax.train.charts import Line, heatmap, line_chart
from dualpipe_jax.train.metrics import read_metrics

FILE, FACTS = "report.html", "run.json"
RUNNING = "running"
# The page is written anew after this many seconds, or after a hundred times as many as
# it took the last time, so that it costs less than a hundredth of the run.
EVERY_S, SHARE = 10.0, 0.01

Record = dict[str, Any]


class LiveReport:
    """Keeps a run's page up to date. What cannot be written never ends the run.

    As a context manager around the steps: an error that leaves it is what the page
    says. `finish` says that all went well.

    Args:
      folder: the run's.
      facts: what run.json holds: about devices, versions and the compilation.

    Attributes:
      failure: why the page could not be written the last time, or None.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self._folder, self._facts = folder, facts
        self._due = 0.0
        self.failure: str | None = None
        self._tell(RUNNING)

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _) -> None:
        if kind is not None:
            self.finish(f"ended by {kind.__name__}: {error}")

    def update(self) -> None:
        """Writes the page, if it is time to; call it after each step."""
        if time.perf_counter() >= self._due:
            self._write(live=True)

    def finish(self, state: str) -> None:
        """Writes the page for the last time; `state` is how the run ended."""
        self._tell(state)
        self._write(live=True)
        # A profile of hundreds of thousands of kernels takes a while to read.
        if (self._folder / _report_overlap.PROFILE).is_dir():
            self._write(live=False)

    def _tell(self, state: str) -> None:
        facts = json.dumps(self._facts | {"state": state}, indent=2) + "\n"
        with contextlib.suppress(OSError):
            _replace(self._folder / FACTS, facts)

    def _write(self, *, live: bool) -> None:
        started, self.failure = time.perf_counter(), None
        try:
            write_report(self._folder, live=live)
        except Exception as error:  # a picture of a run is not worth the run
            self.failure = f"{type(error).__name__}: {error}"
        took = time.perf_counter() - started
        self._due = time.perf_counter() + max(EVERY_S, took / SHARE)


def write_report(
    folder: str | Path, out: str | Path | None = None, *, live: bool = False
) -> Path:
    """Writes a run's page and returns where; see `report_html`.

    Args:
      folder: the run's.
      out: the file; None: report.html in the folder.
      live: as for `report_html`.
    """
    path = Path(out) if out is not None else Path(folder) / FILE
    _replace(path, report_html(folder, live=live))
    return path


def _replace(path: Path, text: str) -> None:
    """Whoever reads finds the old file or the new one, and never a part."""
    # Of this process: `report` may be asked for while the run writes its own.
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def report_html(folder: str | Path, *, live: bool = False) -> str:
    """The page of a run: what it is, its curves, experts, schedule and overlap.

    Everything is in the one file; it loads nothing. While the run is unfinished the
    page reloads itself.

    Args:
      folder: the run's, whose config.json and metrics.jsonl are read, and run.json,
        schedule.svg, sample.txt, overlap.json and profile/ where they are.
      live: leave out what takes long to read.

    Raises:
      ValueError: the folder is not that of a run, has no record yet, or a file of it
        cannot be read.
    """
    folder = Path(folder)
    config, facts = _object(folder / "config.json"), _object(folder / FACTS)
    records = _records(folder)
    name, state = str(config.get("name", folder.name)), str(facts.get("state", ""))
    parts = [
        f"<h1>{_page.escape(name)}</h1>",
        _page.paragraph(_status(config, records, state), "faint"),
        _page.figures(_headline(records)),
        _page.facts(_summary(config, facts, records)),
        *_model(facts),
        *_curves(records, str(facts.get("unit", "byte"))),
        *_experts(records, config),
        *_schedule(folder),
        *_report_overlap.section(folder, live=live),
        *_sample(folder),
        "<h2>Config</h2>",
        _page.folded(
            "config.json", f"<pre>{_page.escape(json.dumps(config, indent=2))}</pre>"
        ),
    ]
    return _page.page(name, parts, reload=state == RUNNING)


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object; an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; is it of a run?")
    return found


def _records(folder: Path) -> list[Record]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not the folder of a run: it has no metrics.jsonl; name what "
            "train's --out named."
        )
    try:
        records = read_metrics(path)
    except ValueError as error:
        raise ValueError(f"{path} has a line that is no JSON: {error}.") from None
    if not all(isinstance(r, dict) and _is_number(r.get("step")) for r in records):
        raise ValueError(f"{path} has a record without a step; is it of a run?")
    if not records:
        raise ValueError(f"{path} has no record yet; try again after the first step.")
    return records


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def series(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have a finite one."""
    having = [r for r in records if _is_number(r.get(name))]
    return [r["step"] for r in having], [r[name] for r in having]


def _last(records: Sequence[Record], name: str) -> float | None:
    values = series(records, name)[1]
    return values[-1] if values else None


def _status(config: Record, records: list[Record], state: str) -> str:
    steps, wanted = records[-1]["step"], config.get("num_steps")
    done = f"{steps} of {wanted} steps" if wanted else f"step {steps}"
    ended = {"": "", RUNNING: "; not finished"}.get(state, f"; {state}")
    now = datetime.datetime.now(datetime.UTC)
    return f"{done}{ended}. Written {now:%Y-%m-%d %H:%M:%S} UTC."


def _headline(records: list[Record]) -> dict[str, str]:
    rates = sorted(series(records, "tokens_per_s")[1])
    values = {
        "loss": (_last(records, "loss"), ".3f"),
        "held-out loss": (_last(records, "held_out_loss"), ".3f"),
        "tokens/s (median)": (rates[len(rates) // 2] if rates else None, ",.0f"),
        "balancedness": (_last(records, "balancedness"), ".3f"),
        "bubble of the schedule": (_last(records, "pipeline_bubble_ratio"), ".1%"),
    }
    return {n: format(v, how) for n, (v, how) in values.items() if v is not None}


def _summary(config: Record, facts: Record, records: list[Record]) -> dict[str, str]:
    rows: dict[str, str] = {}
    if isinstance(mesh := config.get("mesh"), dict):
        rows["mesh"] = " x ".join(f"{axis}={size}" for axis, size in mesh.items())
    if "schedule" in config:
        rows["schedule"] = str(config["schedule"])
    shape = [
        config.get(name)
        for name in ("num_microbatches", "microbatch_size", "sequence_length")
    ]
    if all(_is_number(size) for size in shape):
        per_step = math.prod(size for size in shape if size is not None)
        microbatches, size, length = shape
        rows["batch"] = (
            f"{microbatches} microbatches x {size} sequences x {length} tokens = "
            f"{per_step:,} tokens a step"
        )
        seconds = [
            per_step / rate for rate in series(records, "tokens_per_s")[1] if rate
        ]
        rows["tokens"] = f"{per_step * records[-1]['step']:,} so far"
        rows["time in steps"] = _duration(sum(seconds))
    if _is_number(facts.get("compile_s")):
        rows["compilation"] = _duration(facts["compile_s"])
    for name in ("devices", "processes", "data"):
        if name in facts:
            rows[name] = str(facts[name])
    if isinstance(versions := facts.get("versions"), dict):
        rows["versions"] = ", ".join(f"{name} {v}" for name, v in versions.items())
    return rows


def _model(facts: Record) -> list[str]:
    if not facts.get("model"):
        return []
    text = f"<pre>{_page.escape(str(facts['model']))}</pre>"
    return [_page.folded("Model over the stages", text)]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
    )


def _curves(records: list[Record], unit: str) -> list[str]:
    losses = [
        Line("train", *series(records, "loss"), 1),
        Line("held out", *series(records, "held_out_loss"), 2, dots=True),
    ]
    rate = [Line("tokens/s", *series(records, "tokens_per_s"), 1)]
    return [
        "<h2>Loss</h2>",
        _page.paragraph(f"nats a {unit}", "faint"),
        line_chart("Loss over the steps", losses),
        "<h2>Tokens a second</h2>",
        line_chart("Tokens a second over the steps", rate),
        _numbers(records),
    ]


def _numbers(records: list[Record]) -> str:
    """Some records as a table: the first, the last, and those with a held-out loss."""
    columns = ("loss", "held_out_loss", "tokens_per_s", "balancedness", "grad_norm")
    kept = [r for r in records if "held_out_loss" in r]
    stride = -(-len(kept) // 30) if kept else 1
    chosen = {r["step"]: r for r in [records[0], *kept[::-stride], records[-1]]}
    rows = [
        [
            f"{step:,.0f}",
            *(
                f"{record[name]:,.6g}" if _is_number(record.get(name)) else ""
                for name in columns
            ),
        ]
        for step, record in sorted(chosen.items())
    ]
    return _page.folded("Numbers", _page.table(("step", *columns), rows))


def _experts(records: list[Record], config: Record) -> list[str]:
    lines = [
        Line("mean of layers", *series(records, "balancedness"), 1),
        Line("without placement", *series(records, "balancedness_unplaced"), 3),
    ]
    layered = [r for r in records if _is_layers(r.get("balancedness_layers"))]
    sizes = {len(r["balancedness_layers"]) for r in layered[-1:]}
    layered = [r for r in layered if len(r["balancedness_layers"]) in sizes]
    cells = np.array([r["balancedness_layers"] for r in layered], float)
    steps = [r["step"] for r in layered]
    if layered:
        lines.insert(1, Line("worst layer", steps, cells.min(axis=1).tolist(), 2))
    if not any(line.x for line in lines):
        return []
    parts = [
        "<h2>Balancedness of the experts</h2>",
        _page.paragraph("mean load of a device over the largest; 1 is even", "faint"),
        line_chart("Balancedness over the steps", lines, top=1.0),
    ]
    if layered:
        names = layer_names(config, cells.shape[1])
        parts.append(heatmap("Balancedness of each layer", steps, cells, names))
    else:
        parts.append(_page.paragraph("This run recorded no values by layer.", "faint"))
    return parts


def _is_layers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def layer_names(config: Record, number: int) -> list[str]:
    """What MoE layers are called: by their place in the model, where it is known."""
    model = config.get("model")
    sizes = model.get("architecture") if isinstance(model, dict) else None
    sizes = sizes if isinstance(sizes, dict) else {}
    first, last = sizes.get("first_k_dense_replace"), sizes.get("num_layers")
    if not (isinstance(first, int) and isinstance(last, int)):
        return [str(i) for i in range(number)]
    names = [f"layer {i}" for i in range(first, last)]
    return [*names, *["MTP"] * (number - len(names))][:number]


def _schedule(folder: Path) -> list[str]:
    path = folder / "schedule.svg"
    if not path.is_file():
        return []
    drawn = _page.picture(path.read_text(encoding="utf-8", errors="replace"))
    said = _page.paragraph("schedule.svg is not a picture that train draws.", "faint")
    return ["<h2>Schedule</h2>", drawn or said]


def _sample(folder: Path) -> list[str]:
    path = folder / "sample.txt"
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return ["<h2>Sample</h2>", f"<pre>{_page.escape(text)}</pre>"]
