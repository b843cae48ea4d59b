"""Lays out a timeline once, as boxes and texts in pixels, for both SVG and PNG.

It follows the schedule figure in the README of deepseek-ai/DualPipe: one row per rank,
time to the right, microbatch numbers inside, and a black border around two chunks that
are executed together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from dualpipe_jax.schedules import OPS, StepSpan, Task, Timeline
from eplb_jax.style import EMPTY, FAINT, INK, OPS as COLOURS, PAPER

NAMES = {
    "F": "Forward",
    "B": "Backward",
    "I": "Backward for input",
    "W": "Backward for weights",
}
KINDS = {
    "dualpipe": "DualPipe",
    "dualpipev": "DualPipeV",
    "one_f_one_b": "1F1B",
    "zb1p": "ZB1P",
    "gpipe": "GPipe",
    "zbv": "ZB-V",
    "v_half": "V-Half",
    "v_min": "V-Min",
    "interleaved_1f1b": "Interleaved 1F1B",
    "interleaved_zero_bubble": "Interleaved ZB",
    "looped_bfs": "Looped BFS",
}

_ROW, _GAP, _FONT = 22.0, 3.0, 10.0
_LEFT, _RIGHT, _TOP = 58.0, 24.0, 52.0
_MAX_WIDTH = 16000.0


class Box(NamedTuple):
    """A rectangle; a browser shows `tip` under the pointer."""

    x: float
    y: float
    width: float
    height: float
    fill: str = "none"
    edge: str = "none"
    edge_width: float = 0.0
    tip: str = ""


class Text(NamedTuple):
    """A line of text; its point `anchor` (start, middle or end) lies at x."""

    x: float
    y: float
    text: str
    size: float = _FONT
    anchor: str = "middle"
    colour: str = INK
    bold: bool = False


class Picture(NamedTuple):
    """Everything to draw, from back to front, in pixels from the top left."""

    width: float
    height: float
    title: str
    boxes: tuple[Box, ...]
    texts: tuple[Text, ...]


def title_of(timeline: Timeline) -> str:
    """Returns kind and sizes, such as `DualPipe, 8 ranks, 20 microbatches`."""
    schedule = timeline.schedule
    kind = schedule.kind.removesuffix("_forward")
    name = KINDS.get(kind, kind) + " (forward only)" * (kind != schedule.kind)
    return (
        f"{name}, {_count(schedule.num_ranks, 'rank')}, "
        f"{_count(schedule.num_microbatches, 'microbatch', 'es')}"
    )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number > 1 else ''}"


def summary_of(timeline: Timeline) -> str:
    """Returns makespan, bubble and activations of a timeline in one line."""
    low, high = min(timeline.bubble), max(timeline.bubble)
    bubble = f"{low:.4g}" if math.isclose(low, high) else f"{low:.4g} to {high:.4g}"
    peak = max(timeline.peak_activations)
    return (
        f"makespan {timeline.makespan:.6g}, bubble {bubble} "
        f"({100 * timeline.bubble_ratio:.1f} %)"
        + (f", at most {peak} activations alive" if peak else "")
    )


def draw(timeline: Timeline) -> Picture:
    """Lays out rows, boxes, axis and legend."""
    scale = _scale(timeline)
    span = timeline.makespan * scale
    rows = len(timeline.spans)
    bottom = _TOP + rows * (_ROW + _GAP)
    boxes: list[Box] = []
    texts = [
        Text(_LEFT, 20, title_of(timeline), 14, "start", bold=True),
        Text(_LEFT, 38, summary_of(timeline), 11, "start", FAINT),
    ]
    for rank, spans in enumerate(timeline.spans):
        y = _TOP + rank * (_ROW + _GAP)
        texts.append(Text(_LEFT - 8, y + _ROW / 2 + 4, f"Rank {rank}", 11, "end"))
        boxes.append(Box(_LEFT, y, span, _ROW, fill=EMPTY))
        borders = []
        for item in spans:
            for box, text in _step_boxes(timeline, rank, item, y, scale):
                boxes.append(box)
                if text:
                    texts.append(text)
            if len(item[0]) == 2:
                x, width = _LEFT + item[1] * scale, (item[2] - item[1]) * scale
                borders.append(Box(x, y, width, _ROW, edge=INK, edge_width=1.4))
        boxes += borders
    for time in _axis(timeline.makespan, span):
        x = _LEFT + time * scale
        boxes.append(Box(x - 0.4, bottom, 0.8, 5, fill=FAINT))
        texts.append(Text(x, bottom + 17, f"{time:.6g}", 10, "middle", FAINT))
    right = _legend(timeline, bottom + 32, boxes, texts)
    heading = max(8.0 * len(texts[0].text), 6.2 * len(texts[1].text))
    width = _LEFT + max(span, right - _LEFT, heading) + _RIGHT
    return Picture(width, bottom + 60, title_of(timeline), tuple(boxes), tuple(texts))


def _scale(timeline: Timeline) -> float:
    """Returns pixels per unit of time, so that boxes fit their numbers if possible."""
    lengths = [
        (end - start) / (3 if len(step) == 2 else 1)
        for spans in timeline.spans
        for step, start, end in spans
        if end > start
    ]
    if not lengths:
        return 1.0
    digits = len(str(timeline.schedule.num_microbatches - 1))
    narrowest = 6 + 6 * max(digits, 2)
    return min(
        narrowest / min(lengths),
        6 * narrowest / statistics.median(lengths),
        _MAX_WIDTH / timeline.makespan,
    )


def _step_boxes(
    timeline: Timeline, rank: int, span: StepSpan, y: float, scale: float
) -> Iterator[tuple[Box, Text | None]]:
    step, start, end = span
    x, width = _LEFT + start * scale, (end - start) * scale
    # A pair runs at the same time; its two colours only name the two, as F : B = 1 : 2.
    shares = (1.0,) if len(step) == 1 else (1 / 3, 2 / 3)
    for task, share in zip(step, shares, strict=True):
        part = width * share
        number = str(task.microbatch)
        yield (
            Box(
                x,
                y,
                part,
                _ROW,
                fill=colour_of(timeline, task),
                edge=PAPER,
                edge_width=0.6,
                tip=f"Rank {rank}: {describe(timeline, task)}"
                f"{', overlapped' * (len(step) == 2)}, {start:.6g} to {end:.6g}",
            ),
            Text(x + part / 2, y + _ROW / 2 + 3.7, number)
            if 6.4 * len(number) + 2 <= part
            else None,
        )
        x += part


def colour_of(timeline: Timeline, task: Task) -> str:
    """Returns the fill of a task: by op, and lighter in direction 0."""
    direction = timeline.schedule.direction_of(task.stage, task.microbatch)
    return COLOURS[task.op][direction]


def describe(timeline: Timeline, task: Task) -> str:
    """Describes a task in words."""
    direction = timeline.schedule.direction_of(task.stage, task.microbatch)
    return (
        f"{NAMES[task.op]}, stage {task.stage}, microbatch {task.microbatch}, "
        f"direction {direction}"
    )


def _axis(makespan: float, span: float) -> Iterator[float]:
    if not makespan:
        return
    rough = makespan * 60 / span  # a tick about every 60 pixels
    power = 10.0 ** math.floor(math.log10(rough))
    tick = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    for k in range(math.floor(makespan / tick + 1e-9) + 1):
        yield k * tick


def _legend(timeline: Timeline, y: float, boxes: list[Box], texts: list[Text]) -> float:
    """Appends the legend; returns its right edge."""
    steps = [step for spans in timeline.spans for step, _, _ in spans]
    directions = sorted(
        {
            timeline.schedule.direction_of(t.stage, t.microbatch)
            for s in steps
            for t in s
        }
    )
    x = _LEFT

    def entry(fills: list[str], name: str, border: bool = False) -> None:
        nonlocal x
        for k, fill in enumerate(fills):
            boxes.append(Box(x + 16 * k, y, 16, 14, fill, PAPER, 0.6))
        if border:
            boxes.append(Box(x, y, 16 * len(fills), 14, edge=INK, edge_width=1.4))
        x += 16 * len(fills) + 6
        texts.append(Text(x, y + 11, name, 11, "start"))
        x += 6.6 * len(name) + 18

    for op in OPS:
        if any(task.op == op for step in steps for task in step):
            entry([COLOURS[op][d] for d in directions], NAMES[op])
    if any(len(step) == 2 for step in steps):
        last = directions[-1]
        fills = [COLOURS["F"][0], COLOURS["B"][last]]
        entry(fills, "Forward & backward overlapped", border=True)
    entry([EMPTY], "Bubble")
    if len(directions) == 2:
        note = "(light: direction 0, dark: direction 1)"
        texts.append(Text(x, y + 11, note, 11, "start", FAINT))
        x += 6.2 * len(note)
    return x
