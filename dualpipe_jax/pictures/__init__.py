"""Schedules, timelines and tables as text, SVG, HTML, PNG and Chrome traces.

`pictures.svg(dualpipe(4, 8))` draws a schedule, as do `text`, `png`, `html`,
`chrome_trace` and `save`; `timeline` draws overlap; `bubble_ratios` compares schedules.

Imports: schedules, schedules.generators, lowering. Without jax.
"""

from dualpipe_jax.pictures.bytes import (
    format_bytes as format_bytes,
    parse_bytes as parse_bytes,
)
from dualpipe_jax.pictures.figures import bubble_ratio, bubble_ratios, bubble_table
from dualpipe_jax.pictures.intervals import (
    Interval as Interval,
    intersection as intersection,
    length as length,
    union as union,
)
from dualpipe_jax.pictures.phases import (
    PAIR_NAMES as PAIR_NAMES,
    PARTS as PARTS,
    PASSES as PASSES,
    named_phase as named_phase,
    pass_of as pass_of,
    phase as phase,
)
from dualpipe_jax.pictures.picture import KINDS as KINDS, title_of as title_of
from dualpipe_jax.pictures.show import (
    FORMATS as FORMATS,
    chrome_trace,
    html,
    png,
    save,
    svg,
    text,
)
from dualpipe_jax.pictures.tables import (
    TableRow as TableRow,
    aligned as aligned,
    html_table as html_table,
)
from dualpipe_jax.pictures.trace_writer import ChromeTrace as ChromeTrace
from dualpipe_jax.pictures.tracks import TrackSpan, timeline

__all__ = [
    "TrackSpan",
    "bubble_ratio",
    "bubble_ratios",
    "bubble_table",
    "chrome_trace",
    "html",
    "png",
    "save",
    "svg",
    "text",
    "timeline",
]
