"""Pictures of a schedule: text, SVG, HTML, PNG, and a Chrome trace for Perfetto.

Every function takes a `Timeline`, or a `Schedule`, which is simulated at unit costs
(F=I=W=1, B=2, F&B=3) like the published figures.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from dualpipe_jax.pictures import (
    chrome as _chrome,
    picture as _picture,
    render as _render,
)
from dualpipe_jax.schedules import Schedule, Step, Timeline, simulate
from eplb_jax import style


def text(shown: Schedule | Timeline) -> str:
    """Draws a grid of characters, to scale: one row per rank.

    Each box starts with op and microbatch and continues with dashes; dots are bubbles.
    Small letters are direction 1.

    Examples:
      >>> from dualpipe_jax.schedules.generators.dualpipev import dualpipev
      >>> print(text(dualpipev(2, 4)))
      DualPipeV, 2 ranks, 4 microbatches
      makespan 26, bubble 2 (7.7 %), at most 5 activations alive
      rank 0 |F0F1F2f0i0w0f1F3&b1-..f2&B0-b2--..f3&B1-b3--I2W2I3W3|
      rank 1 |..F0f0F1f1F2b0--f2&B0-F3&b1-f3&B1-b2--B2--..i3I3w3W3|
      F forward, B backward, I backward for input, W backward for weights, & overlapped;
      small letters: direction 1; dots: bubble
    """
    timeline = _timeline(shown)
    schedule = timeline.schedule

    def label(step: Step) -> str:
        return "&".join(
            (t.op.lower() if schedule.direction_of(t.stage, t.microbatch) else t.op)
            + str(t.microbatch)
            for t in step
        )

    spans = [span for rank in timeline.spans for span in rank if span[2] > span[1]]
    longest = max(map(len, timeline.spans))
    scale = min(
        max((len(label(s)) / (end - start) for s, start, end in spans), default=1.0),
        # A step far shorter than its label is drawn without its number.
        12 * longest / (timeline.makespan or 1.0),
    )
    digits = len(str(schedule.num_ranks - 1))
    rows = [_picture.title_of(timeline), _picture.summary_of(timeline)]
    for rank, rank_spans in enumerate(timeline.spans):
        row = ["."] * round(timeline.makespan * scale)
        for step, start, end in rank_spans:
            first, last = round(start * scale), round(end * scale)
            name, width = label(step), last - first
            row[first:last] = (
                name.ljust(width, "-") if len(name) <= width else name[0] * width
            )
        rows.append(f"rank {rank:<{digits}} |{''.join(row)}|")
    rows.append(
        "F forward, B backward, I backward for input, W backward for weights, "
        "& overlapped;\nsmall letters: direction 1; dots: bubble"
    )
    return "\n".join(rows)


def svg(shown: Schedule | Timeline) -> str:
    """Draws a self-contained SVG in the style of the published schedule figure."""
    return _render.to_svg(_picture.draw(_timeline(shown)))


def png(shown: Schedule | Timeline, dpi: int = 200) -> bytes:
    """Draws the same picture as PNG; needs matplotlib.

    Raises:
      ImportError: matplotlib is not installed.
    """
    return _render.to_png(_picture.draw(_timeline(shown)), dpi)


def html_fragment(shown: Schedule | Timeline) -> str:
    """Returns the SVG in a box that scrolls sideways, as displayed in a notebook."""
    return f'<div style="overflow-x: auto">{svg(shown)}</div>'


def html(shown: Schedule | Timeline) -> str:
    """Returns a self-contained page: the picture, and a table of the ranks."""
    timeline = _timeline(shown)
    rows = "\n".join(
        f"<tr><td>{rank}</td><td>{busy:.6g}</td><td>{bubble:.6g}</td><td>{peak}</td></tr>"
        for rank, (busy, bubble, peak) in enumerate(
            zip(timeline.busy, timeline.bubble, timeline.peak_activations, strict=True)
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{escape(_picture.title_of(timeline))}</title>
<style>
body {{ font-family: Helvetica, Arial, sans-serif; margin: 1.5em; color: {style.INK};
  background: {style.PAPER} }}
td, th {{ padding: 0.15em 0.9em; text-align: right }}
th {{ border-bottom: 1px solid {style.FAINT} }}
</style>
</head>
<body>
{html_fragment(timeline)}
<table>
<thead>
<tr><th>Rank</th><th>Busy</th><th>Bubble</th><th>Peak activations</th></tr>
</thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


def chrome_trace(shown: Schedule | Timeline, microseconds_per_unit: float = 1e3) -> str:
    """Writes a Chrome trace for Perfetto or chrome://tracing: steps and streams.

    A rank has three tracks: its steps, such as `F 3 & B 1`, and the phases inside them,
    in DeepSeek's names, on a compute and a communication stream. The simulator has no
    phases: they divide a step's duration as in DeepSeek's published profile. Messages
    to other ranks are on the communication stream as `PP`.

    Args:
      shown: what to export.
      microseconds_per_unit: length of one unit of cost; a millisecond by default.
    """
    return _chrome.trace(_timeline(shown), microseconds_per_unit).dumps()


def _csv(shown: Schedule | Timeline) -> str:
    return (shown if isinstance(shown, Schedule) else shown.schedule).to_csv()


def _json(shown: Schedule | Timeline) -> str:
    return (shown if isinstance(shown, Schedule) else shown.schedule).to_json()


FORMATS: dict[str, Callable[[Schedule | Timeline], str | bytes]] = {
    "text": lambda shown: text(shown) + "\n",
    "csv": _csv,
    "json": _json,
    "svg": svg,
    "png": png,
    "html": html,
    "chrome": chrome_trace,
}
_SUFFIXES = {".txt": "text", ".json": "chrome"}


def save(
    shown: Schedule | Timeline,
    path: str | Path,
    format: str | None = None,  # noqa: A002
) -> None:
    """Writes a picture to a file.

    Args:
      shown: what to draw.
      path: the file to write.
      format: one of `FORMATS`; by default from the path's suffix (`.json` is a Chrome
        trace; `format="json"` writes the schedule itself).

    Raises:
      ValueError: the format is unknown.
    """
    path = Path(path)
    if format is None:
        format = _SUFFIXES.get(path.suffix, path.suffix[1:])  # noqa: A001
    if format not in FORMATS:
        raise ValueError(
            f"{format=} of path={str(path)!r} is unknown; use one of "
            f"{', '.join(FORMATS)}."
        )
    made = FORMATS[format](shown)
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        path.write_text(made, encoding="utf-8")


def _timeline(shown: Schedule | Timeline) -> Timeline:
    return shown if isinstance(shown, Timeline) else simulate(shown)
