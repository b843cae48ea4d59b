"""The sections of a run's page: figures, curves, experts, schedule and sample.

Each takes what a run's files hold, where any value may be missing or of another kind,
and returns HTML.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualpipe_jax.train import page as _page
from dualpipe_jax.train.charts import Line, heatmap, line_chart
from dualpipe_jax.train.folder import LAUNCHES

RUNNING = "running"

Record = dict[str, Any]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def series(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have a finite one."""
    having = [r for r in records if is_number(r.get(name))]
    return [r["step"] for r in having], [r[name] for r in having]


def _last(records: Sequence[Record], name: str) -> float | None:
    values = series(records, name)[1]
    return values[-1] if values else None


def status(config: Record, records: list[Record], state: str) -> str:
    """How far the run is."""
    steps, wanted = records[-1]["step"], config.get("num_steps")
    done = f"{steps} of {wanted} steps" if wanted else f"step {steps}"
    ended = {"": "", RUNNING: "; not finished"}.get(state, f"; {state}")
    now = datetime.datetime.now(datetime.UTC)
    return f"{done}{ended}. Written {now:%Y-%m-%d %H:%M:%S} UTC."


def headline(records: list[Record]) -> dict[str, str]:
    """The last values of the most important metrics."""
    rates = sorted(series(records, "tokens_per_s")[1])
    values = {
        "loss": (_last(records, "loss"), ".3f"),
        "held-out loss": (_last(records, "held_out_loss"), ".3f"),
        "bits per byte": (_last(records, "held_out_bits_per_byte"), ".3f"),
        "tokens/s (median)": (rates[len(rates) // 2] if rates else None, ",.0f"),
        "balancedness": (_last(records, "balancedness"), ".3f"),
        "bubble of the schedule": (_last(records, "pipeline_bubble_ratio"), ".1%"),
    }
    return {n: format(v, how) for n, (v, how) in values.items() if v is not None}


def summary(config: Record, facts: Record, records: list[Record]) -> dict[str, str]:
    """The run's sizes, times, devices and versions."""
    rows: dict[str, str] = {}
    if isinstance(mesh := config.get("mesh"), dict):
        rows["mesh"] = " x ".join(f"{axis}={size}" for axis, size in mesh.items())
    if "schedule" in config:
        rows["schedule"] = str(config["schedule"])
    shape = [
        config.get(name)
        for name in ("num_microbatches", "microbatch_size", "sequence_length")
    ]
    if all(is_number(size) for size in shape):
        per_step = math.prod(size for size in shape if size is not None)
        microbatches, size, length = shape
        rows["batch"] = (
            f"{microbatches} microbatches x {size} sequences x {length} tokens = "
            f"{per_step:,} tokens per step"
        )
        seconds = [
            per_step / rate for rate in series(records, "tokens_per_s")[1] if rate
        ]
        rows["tokens"] = f"{per_step * records[-1]['step']:,} so far"
        rows["time in steps"] = _duration(sum(seconds))
    if any(skipped := series(records, "skipped")[1]):
        rows["skipped steps"] = f"{sum(skipped):.0f}, not finite"
    if is_number(facts.get("compile_s")):
        rows["compilation"] = _duration(facts["compile_s"])
    for name in ("devices", "processes", "data"):
        if name in facts:
            rows[name] = str(facts[name])
    if isinstance(versions := facts.get("versions"), dict):
        rows["versions"] = ", ".join(f"{name} {v}" for name, v in versions.items())
    return rows


def launches(folder: Path) -> list[str]:
    """When `launch` has started the run again, and why."""
    try:
        text = (folder / LAUNCHES).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return ["<h2>Started again</h2>", f"<pre>{_page.escape(_events(text))}</pre>"]


def _events(text: str) -> str:
    lines = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
            lines.append(f"{record['time']}  {record['event']}")
        except (ValueError, TypeError, KeyError):  # cut off by a full disk
            lines.append(line)
    return "\n".join(lines)


def model(facts: Record) -> list[str]:
    """How the model is laid out."""
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


def curves(records: list[Record], unit: str) -> list[str]:
    """Loss and speed."""
    losses = [
        Line("train", *series(records, "loss"), 1),
        Line("held out", *series(records, "held_out_loss"), 2, dots=True),
    ]
    rate = [Line("tokens/s", *series(records, "tokens_per_s"), 1)]
    return [
        "<h2>Loss</h2>",
        _page.paragraph(f"nats per {unit}", "faint"),
        line_chart("Loss over the steps", losses),
        "<h2>Tokens per second</h2>",
        line_chart("Tokens per second over the steps", rate),
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
                f"{record[name]:,.6g}" if is_number(record.get(name)) else ""
                for name in columns
            ),
        ]
        for step, record in sorted(chosen.items())
    ]
    return _page.folded("Numbers", _page.table(("step", *columns), rows))


def experts(records: list[Record], config: Record) -> list[str]:
    """How evenly the experts' devices are loaded."""
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
        parts.append(
            _page.paragraph("This run recorded no values for each layer.", "faint")
        )
    return parts + _exact_balance(records)


def _exact_balance(records: list[Record]) -> list[str]:
    """What the plans of the microbatches gain, and what they send."""
    planned = Line("planned", *series(records, "balancedness_exact"), 1)
    if not planned.x:
        return []
    before = Line("at home", *series(records, "balancedness_before"), 3)
    sent = [
        Line("weights fetched", *series(records, "fetched_mib"), 1),
        Line("tokens to other devices", *series(records, "dispatched_mib"), 3),
    ]
    return [
        "<h2>Exact balance</h2>",
        _page.paragraph("balancedness inside of each microbatch", "faint"),
        line_chart("Balancedness of the microbatches", [planned, before], top=1.0),
        _page.paragraph("MiB per device, layer and microbatch, forward", "faint"),
        line_chart("MiB sent over the steps", sent),
    ]


def _is_layers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_number, value))


def layer_names(config: Record, number: int) -> list[str]:
    """Names of the MoE layers: their places in the model, if these are known."""
    model = config.get("model")
    sizes = model.get("architecture") if isinstance(model, dict) else None
    sizes = sizes if isinstance(sizes, dict) else {}
    # Runs of before the configs took the published names have `num_layers`.
    last = sizes.get("num_hidden_layers", sizes.get("num_layers"))
    first = sizes.get("first_k_dense_replace")
    if not (isinstance(first, int) and isinstance(last, int)):
        return [str(i) for i in range(number)]
    names = [f"layer {i}" for i in range(first, last)]
    return [*names, *["MTP"] * (number - len(names))][:number]


def schedule(folder: Path) -> list[str]:
    """The schedule's picture."""
    path = folder / "schedule.svg"
    if not path.is_file():
        return []
    drawn = _page.picture(path.read_text(encoding="utf-8", errors="replace"))
    said = _page.paragraph("schedule.svg is not a picture that train draws.", "faint")
    return ["<h2>Schedule</h2>", drawn or said]


def sample(folder: Path) -> list[str]:
    """Generated text."""
    path = folder / "sample.txt"
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return ["<h2>Sample</h2>", f"<pre>{_page.escape(text)}</pre>"]
