"""The page's section on hidden communication, measured or estimated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualpipe_jax.pictures import timeline
from dualpipe_jax.profiles import read_trace
from dualpipe_jax.train import page as _page
from eplb_jax import style

PROFILE, ESTIMATE = "profile", "overlap.json"
_HEAD = ("loop", "one run", "compute", "communication", "hidden", "exposed", "hidden %")
_PHASES = ("phase", "compute", "communication", "hidden")
_MOST = 12  # loops; a step has many that hardly matter


def section(folder: Path, *, live: bool = False) -> list[str]:
    """The section's HTML. `live`: without the profile, which takes long to read."""
    parts = []
    if (folder / PROFILE).is_dir():
        later = "The profile is shown here when the run has ended."
        parts += [_page.paragraph(later)] if live else profile(folder / PROFILE)
    if (folder / ESTIMATE).is_file():
        parts += estimate(folder / ESTIMATE)
    if not parts:
        parts.append(
            _page.paragraph(
                "This run's overlap is not known. train --profile measures it; "
                "python -m dualpipe_jax overlap CONFIG --json > "
                f"{folder / ESTIMATE} estimates it for GPUs.",
                "faint",
            )
        )
    return ["<h2>Communication under compute</h2>", *parts]


def profile(folder: Path) -> list[str]:
    """What the profiler recorded of some steps: figures, phases, and a timeline."""
    try:
        trace = read_trace(folder)
    except (ValueError, OSError) as error:
        return [_page.paragraph(f"The profile cannot be read: {error}", "faint")]
    drawn = style.png(timeline(trace), dpi=110)
    several = len({span.device for span in trace.spans}) > 1
    said = (
        f"Measured: {trace.comm_hidden:.1%} of {trace.comm_us / 1e3:.1f} ms "
        f"communication hidden, devices compute in {trace.compute_busy:.1%} of "
        f"{trace.span_us / 1e3:.1f} ms"
        + (" (means of all devices; below, the first)." if several else ".")
    )
    phases = [
        (name, *(f"{us / 1e3:.2f} ms" for us in (p.compute_us, p.comm_us, p.hidden_us)))
        for name, p in trace.phases.items()
    ]
    parts = [
        _page.paragraph(said),
        _page.image(drawn, "What ran when, and what communication was exposed"),
    ]
    if phases:
        parts.append(_page.folded("Phases", _page.table(_PHASES, phases)))
    return parts


def estimate(path: Path) -> list[str]:
    """The table of `overlap CONFIG --json`, or what is wrong with the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        loops = sorted(
            found["loops"], key=lambda loop: loop["name"] != found["steady_state"]
        )
        rows = [_row(loop) for loop in loops[:_MOST]]
        said = (
            f"Estimated for {found['gpu']}, {found['gpus_per_node']} a node, by "
            "python -m dualpipe_jax overlap; the steady state first."
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # It may be half-written.
        said = (
            f"{path.name} is not what overlap --json prints ({type(error).__name__}: "
            f"{error}); write it again, or remove it."
        )
        return [_page.paragraph(said, "faint")]
    return [_page.paragraph(said, "faint"), _page.table(_HEAD, rows)]


def _row(loop: dict[str, Any]) -> list[str]:
    times = [
        loop["makespan_s"],
        loop["compute"]["seconds"],
        loop["communication_s"],
        loop["hidden_s"],
        loop["exposed_s"],
    ]
    return [
        f"{loop['name']} ({loop['kind']})",
        *(f"{1e3 * seconds:.3f} ms" for seconds in times),
        f"{loop['hidden_fraction']:.1%}",
    ]
