"""Charts as SVG for the report's page: no matplotlib, so that a run can draw them.

Their colours are variables of the page's CSS (see `_page`); a dark screen has others.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from eplb_jax import style

MAX_POINTS = 400  # of a line; more are binned
MAX_COLUMNS = 240  # of a heatmap
_WIDTH, _HEIGHT = 720, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 30, 40


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
      name: in the legend.
      x: ascending.
      y: the value at each x; values that are not finite are left out.
      colour: of the page's `--line-1` to `--line-3`.
      dots: whether each point is marked, and shows its value under the pointer.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dots: bool = False


class Binned(NamedTuple):
    """Groups of neighbouring points: mean x, mean y, and the range of y."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    size: int


def binned(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> Binned:
    """Averages neighbours, so that at most `limit` points are left.

    Examples:
      >>> few = binned([1, 2, 3, 4, 5], [1, 3, 5, 9, 2], limit=3)
      >>> few.y.tolist(), few.high.tolist(), few.size
      ([2.0, 7.0, 2.0], [3.0, 9.0, 2.0], 2)
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    xs, ys = xs[np.isfinite(ys)], ys[np.isfinite(ys)]
    size = max(1, -(-len(ys) // limit))
    firsts = np.arange(0, len(ys), size)
    if not len(ys):
        return Binned(xs, ys, ys, ys, size)
    counts = np.diff(np.append(firsts, len(ys)))
    return Binned(
        np.add.reduceat(xs, firsts) / counts,
        np.add.reduceat(ys, firsts) / counts,
        np.minimum.reduceat(ys, firsts),
        np.maximum.reduceat(ys, firsts),
        size,
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high.

    Examples:
      >>> ticks(0, 6.1)
      [0.0, 2.0, 4.0, 6.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


class Frame:
    """Maps numbers to places on a chart.

    Args:
      x: least and largest.
      y: at the bottom and at the top.
      height: of the whole chart.
    """

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], height: int = _HEIGHT
    ):
        self.x, self.y, self.height = _apart(x), _apart(y), height
        self.bottom = height - _BOTTOM

    def at(self, x: float, y: float) -> str:
        """A point's coordinates, as SVG writes them."""
        return f"{self.across(x):.2f},{self.up(y):.2f}"

    def across(self, x: float) -> float:
        """The horizontal coordinate."""
        low, high = self.x
        return _LEFT + (x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def up(self, y: float) -> float:
        """The vertical coordinate."""
        low, high = self.y
        return self.bottom - (y - low) / (high - low) * (self.bottom - _TOP)

    def x_axis(self, label: str) -> str:
        """The horizontal axis, with numbers."""
        parts = [
            f'<path class="axis" d="M{_LEFT},{self.bottom}H{_WIDTH - _RIGHT}"/>',
            _text(_WIDTH - _RIGHT, self.height - 6, label, "end", "faint"),
        ]
        for tick in ticks(*self.x, 8):
            if tick == int(tick):
                at = self.across(tick)
                parts.append(_text(at, self.bottom + 16, f"{tick:.9g}", "middle", "x"))
        return "".join(parts)

    def y_axis(self) -> str:
        """Grid lines, with numbers."""
        return "".join(
            f'<path class="grid" d="M{_LEFT},{self.up(t):.2f}H{_WIDTH - _RIGHT}"/>'
            + _text(_LEFT - 6, self.up(t) + 4, f"{t:,.6g}", "end", "y")
            for t in ticks(*self.y)
        )


def _apart(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return (
        f'<text class="{kind}" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _means(size: int) -> str:
    if size == 1:
        return ""
    return _text(_WIDTH - _RIGHT, 16, f"means of {size} steps", "end", "faint")


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<div class="wide"><svg class="chart" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></div>'
    )


def line_chart(title: str, lines: Sequence[Line], *, top: float | None = None) -> str:
    """Lines over the steps, from zero. Means stand for many points, with their range.

    Args:
      title: for screen readers.
      lines: at least one with a point.
      top: of the y axis; None: the largest value of all.
    """
    drawn = [(line, binned(line.x, line.y)) for line in lines]
    drawn = [(line, few) for line, few in drawn if len(few.x)]
    if not drawn:
        return '<p class="faint">No finite value yet.</p>'
    ends = [float(x) for line, _ in drawn for x in (line.x[0], line.x[-1])]
    highest = max(float(few.high.max()) for _, few in drawn)
    lowest = min(0.0, *(float(few.low.min()) for _, few in drawn))
    frame = Frame((min(ends), max(ends)), (lowest, top or 1.04 * highest))
    parts = [frame.y_axis(), frame.x_axis("step")]
    at = float(_LEFT)
    for line, few in drawn:
        colour = f"var(--line-{line.colour})"
        if few.size > 1 and not line.dots:
            around = [*zip(few.x, few.high, strict=True)]
            around += [*zip(few.x, few.low, strict=True)][::-1]
            points = " ".join(frame.at(*point) for point in around)
            parts.append(f'<polygon class="band" fill="{colour}" points="{points}"/>')
        points = " ".join(frame.at(*point) for point in zip(few.x, few.y, strict=True))
        parts.append(
            f'<polyline class="line" data-name="{escape(line.name)}" '
            f'stroke="{colour}" points="{points}"/>'
        )
        if line.dots or len(few.x) == 1:
            parts += [
                f'<circle r="3.5" cx="{frame.across(x):.2f}" cy="{frame.up(y):.2f}" '
                f'fill="{colour}"><title>step {x:.9g}: {y:.4g}</title></circle>'
                for x, y in zip(few.x, few.y, strict=True)
            ]
        parts.append(
            f'<path d="M{at:.0f},12h18" stroke="{colour}" stroke-width="3"/>'
            + _text(at + 24, 16, line.name)
        )
        at += 24 + 7 * len(line.name) + 20
    parts.append(_means(max(few.size for _, few in drawn)))
    return _svg(title, _HEIGHT, parts)


def heatmap(
    title: str, x: Sequence[float], cells: np.ndarray, names: Sequence[str]
) -> str:
    """A heatmap over the steps, in the colours of `style.SCALE`: dark is bad.

    Args:
      title: for screen readers.
      x: [steps], ascending.
      cells: [steps, rows], at most 1; several steps are averaged into one column.
      names: of the rows.
    """
    size = -(-len(x) // MAX_COLUMNS)
    firsts = range(0, len(x), size)
    means = np.stack([cells[i : i + size].mean(axis=0) for i in firsts]).T
    low = min(0.9, math.floor(10 * float(np.nanmin(means))) / 10)
    rows = len(names)
    row = min(16, max(4, 480 / rows))
    height = round(_TOP + rows * row + _BOTTOM)
    # Each step's cell is centred on its number.
    apart = (x[-1] - x[0]) / (len(x) - 1) if len(x) > 1 else 1.0
    left = x[0] - apart / 2
    frame = Frame((left, left + apart * size * means.shape[1]), (0, 1), height)
    depth = frame.bottom - _TOP
    colours = np.array(
        [[_rgb8(c, low) for c in line] for line in means.tolist()], np.uint8
    )
    data = base64.b64encode(png(colours)).decode()
    parts = [
        f'<image class="cells" x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}"'
        f' height="{depth}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>',
        frame.x_axis("step"),
    ]
    every = max(1, math.ceil(14 / row))
    for i in range(0, rows, every):
        y = _TOP + (i + 0.5) * depth / rows + 4
        parts.append(_text(_LEFT - 6, y, names[i], "end", "y"))
    steps = 40
    for i in range(steps):
        colour = style.scale(i / (steps - 1))
        parts.append(
            f'<rect x="{_LEFT + 26 + 3 * i}" y="4" width="3.2" height="12" '
            f'fill="{colour}"/>'
        )
    parts.append(_text(_LEFT + 20, 14, f"{low:.1f}", "end"))
    parts.append(_text(_LEFT + 32 + 3 * steps, 14, "1.0 (even)"))
    parts.append(_means(size))
    return _svg(title, height, parts)


def _rgb8(value: float, low: float) -> tuple[int, ...]:
    known = math.isfinite(value)
    colour = style.scale((value - low) / (1 - low)) if known else style.EMPTY
    return tuple(round(255 * part) for part in style.rgb(colour))


def png(pixels: np.ndarray) -> bytes:
    """[height, width, 3] uint8 as a PNG file.

    Examples:
      >>> png(np.zeros((1, 2, 3), np.uint8))[1:4]
      b'PNG'
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
