"""The overlap timeline: a track for compute, and one for each link or stream."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dualpipe_jax.pictures.intervals import Interval, length, union
from eplb_jax import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Width of a letter and of a figure, in inches.
_LETTER, _WIDTH = 0.075, 12.0
_GAP = 0.002  # of the time that is drawn; spans closer than this share a label
_MANY = 3000  # spans; as shapes they would make an SVG of megabytes


class TrackSpan(NamedTuple):
    """A kernel or message on a track of a timeline.

    Attributes:
      track: such as `Compute` or `NVLink`; tracks that mostly compute come first.
      name: what ran.
      begin: in microseconds.
      end: in microseconds.
      is_comm: whether it communicates, which is hidden while any track computes.
      phase: such as `attn(F)` or `dispatch(B)`; empty if unknown.
    """

    track: str
    name: str
    begin: float
    end: float
    is_comm: bool
    phase: str = ""


def timeline(
    shown: Any,
    *,
    between: tuple[float, float] | None = None,
    device: Any = None,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Draws what ran when: compute by phase, and communication hidden or exposed.

    Args:
      shown: an `OverlapReport` (its steady state), a `TraceReport`, or `TrackSpan`s.
      between: draw only this range, in microseconds after the first span's begin.
      device: one of a trace's devices; by default the first.
      title: above the picture; by default the report's.
      note: below the title; by default the duration and the share that is hidden.

    Returns:
      A matplotlib `Figure`. Communication is exposed while nothing is computed.

    Raises:
      ValueError: there is nothing to draw.
      ImportError: matplotlib is not installed.

    Examples:
      >>> figure = timeline([
      ...     TrackSpan("Compute", "gemm", 0, 6, False, "mlp(F)"),
      ...     TrackSpan("NVLink", "all-to-all", 4, 8, True, "combine(F)")])
      >>> figure.axes[0].get_title(loc="left")
      '8.0 µs; 4.0 µs of communication, 50.0 % under compute'
    """
    spans = _spans_of(shown, device)
    if not spans:
        raise ValueError(
            "shown has no span, so there is nothing to draw; pass a report of a "
            "program or trace with kernels."
        )
    zero = min(span.begin for span in spans)
    low, high = between or (0.0, max(span.end for span in spans) - zero)
    cut = []
    for span in spans:
        begin, end = max(span.begin - zero, low), min(span.end - zero, high)
        if end > begin:
            cut.append(span._replace(begin=begin, end=end))
    if not cut:
        raise ValueError(f"{between=} holds no span; the last one ends at {high:g}.")
    if title is None:
        title = str(getattr(shown, "title", ""))
    return _draw(cut, title, note, low, high)


def _spans_of(shown: Any, device: Any) -> list[TrackSpan]:
    """Returns the spans of a report, or spans as they are."""
    found = list(getattr(shown, "spans", shown))
    if not found or isinstance(found[0], TrackSpan):
        return found
    devices = list(dict.fromkeys(each.device for each in found))
    if device is None:
        device = devices[0]
    if device not in devices:
        known = ", ".join(map(str, devices))
        raise ValueError(f"{device=} is not in the trace; it has {known}.")
    return [
        TrackSpan(
            track=_stream_name(each.stream),
            name=each.name,
            begin=each.begin_us,
            end=each.end_us,
            is_comm=each.is_comm,
            phase=each.phase or "",
        )
        for each in found
        if each.device == device
    ]


def _stream_name(stream: Any) -> str:
    return f"Stream {stream}" if str(stream).isdigit() else str(stream)


def split(
    interval: Interval, covers: Sequence[Interval]
) -> list[tuple[Interval, bool]]:
    """Splits an interval into parts that `covers` (disjoint, sorted) covers or not.

    Examples:
      >>> split((0, 10), [(2, 4), (8, 12)])
      [((0, 2), False), ((2, 4), True), ((4, 8), False), ((8, 10), True)]
    """
    now, end = interval
    parts: list[tuple[Interval, bool]] = []
    first = max(0, bisect.bisect_right(covers, (now, math.inf)) - 1)
    for begin, stop in covers[first:]:
        if begin >= end:
            break
        if stop <= now:
            continue
        if begin > now:
            parts.append(((now, begin), False))
        parts.append(((max(begin, now), min(stop, end)), True))
        now = parts[-1][0][1]
    if now < end:
        parts.append(((now, end), False))
    return parts


def colour_of(phase: str) -> str:
    """Returns the colour of a compute phase: hue by pass, attention the lighter one.

    Examples:
      >>> colour_of("attn(F)") == style.OPS["F"][0], colour_of("rope") == style.OTHER
      (True, True)
    """
    part, _, rest = phase.partition("(")
    shades = style.OPS.get(rest.rstrip(")"))
    if shades is None or part not in ("attn", "mlp"):
        return style.OTHER
    return shades[0] if part == "attn" else shades[1]


def _draw(
    spans: list[TrackSpan], title: str, note: str | None, low: float, high: float
) -> Figure:
    tracks: dict[str, list[TrackSpan]] = {}
    for span in sorted(spans, key=lambda span: span.begin):
        tracks.setdefault(span.track, []).append(span)
    tracks = dict(sorted(tracks.items(), key=lambda item: _rank(item[1])))
    computing = union((s.begin, s.end) for s in spans if not s.is_comm)
    height = 1.5 + 0.42 * len(tracks)
    figure = style.figure(_WIDTH, height)
    (axes,) = style.axes(figure, grid="x")
    unit, per_unit = ("ms", 1e3) if high - low > 2e3 else ("µs", 1.0)
    legend: dict[str, str] = {}
    for row, on_track in enumerate(tracks.values()):
        boxes: list[tuple[Interval, str]] = []
        for span in on_track:
            if span.is_comm:
                for part, hidden in split((span.begin, span.end), computing):
                    boxes.append((part, style.HIDDEN if hidden else style.EXPOSED))
            else:
                boxes.append(((span.begin, span.end), colour_of(span.phase)))
        for span in on_track:
            if not span.is_comm:
                colour = colour_of(span.phase)
                known = span.phase if colour != style.OTHER else "other compute"
                legend.setdefault(known, colour)
        axes.broken_barh(
            [(a / per_unit, (b - a) / per_unit) for (a, b), _ in boxes],
            (row - 0.4, 0.8),
            facecolors=[colour for _, colour in boxes],
            linewidth=0,
            rasterized=len(spans) > _MANY,
        )
        _label(axes, on_track, row, high - low, per_unit)
    axes.set_ylim(len(tracks) - 0.4, -0.6)
    axes.set_xlim(low / per_unit, high / per_unit)
    axes.set_yticks(range(len(tracks)), list(tracks))
    axes.set_xlabel(f"time, {unit}")
    axes.spines["left"].set_visible(False)
    talking = union((s.begin, s.end) for s in spans if s.is_comm)
    legend = dict(sorted(legend.items(), key=_legend_order))
    below = f"{(high - low) / per_unit:.1f} {unit}"
    if talking:
        legend["communication under compute"] = style.HIDDEN
        legend["communication, nothing computed"] = style.EXPOSED
        hidden = math.fsum(
            b - a for t in talking for (a, b), under in split(t, computing) if under
        )
        below += (
            f"; {length(talking) / per_unit:.1f} {unit} of communication, "
            f"{100 * hidden / length(talking):.1f} % under compute"
        )
    _legend(figure, legend)
    style.heading(figure, title, note or below)
    return figure


def _rank(spans: Sequence[TrackSpan]) -> tuple[bool, float]:
    """Sorts tracks that compute above those that communicate, the busiest first."""
    comm = length((s.begin, s.end) for s in spans if s.is_comm)
    busy = length((s.begin, s.end) for s in spans)
    return comm > busy / 2, -busy


def _legend_order(entry: tuple[str, str]) -> tuple[int, str]:
    part, _, rest = entry[0].partition("(")
    known = ("F)", "B)", "I)", "W)")
    return known.index(rest) if rest in known else len(known), part


def _label(
    axes: Any, spans: Sequence[TrackSpan], row: int, whole: float, per_unit: float
) -> None:
    """Labels each phase that lasts long enough."""
    runs: list[tuple[str, float, float, bool]] = []
    for span in spans:
        label = span.phase or span.name
        if (
            runs
            and (label, span.is_comm) == (runs[-1][0], runs[-1][3])
            and span.begin - runs[-1][2] < _GAP * whole
        ):
            runs[-1] = (label, runs[-1][1], max(span.end, runs[-1][2]), span.is_comm)
        else:
            runs.append((label, span.begin, span.end, span.is_comm))
    inches = (_WIDTH - 1.2) / whole
    for label, begin, end, _ in runs:
        if (end - begin) * inches > _LETTER * len(label):
            axes.text(
                (begin + end) / 2 / per_unit, row, label, ha="center", va="center",
                fontsize=style.SMALL, color=style.INK, clip_on=True, parse_math=False,
            )  # fmt: skip


def _legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
        loc="outside lower left",
        ncols=len(colours) if len(colours) <= 10 else -(-len(colours) // 2),
        frameon=False,
        fontsize=style.SMALL,
        labelcolor=style.INK,
        handlelength=1.2,
        columnspacing=1.2,
    )
