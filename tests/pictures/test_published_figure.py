"""DualPipe's picture is that of deepseek-ai/DualPipe's README, cell by cell.

The expected cells come only from upstream's order of 8 ranks and 20 microbatches,
replayed here at the figure's costs; the drawn cells are read only from the SVG, in the
figure's conventions: a row per rank, a batch ID in each cell, a colour for each kind
and direction as in the legend, and a shared black border around two cells that overlap.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from dualpipe_jax import dualpipe
from dualpipe_jax.pictures import show

DATA = Path(__file__).parents[1] / "data" / "dualpipe_orders.json"
NUM_RANKS, NUM_MICROBATCHES = 8, 20
COSTS = {"F": 1, "I": 1, "W": 1, "B": 2}
OVERLAPPED = 3


class Cell(NamedTuple):
    op: str
    microbatch: int
    direction: int
    overlapped: bool
    start: float  # of its step
    end: float


def replay(orders):
    """Runs upstream's order: a step starts when its rank and all inputs are ready."""
    free, position = [0] * NUM_RANKS, [0] * NUM_RANKS
    done = {}  # (op, rank, direction, index) -> when
    rows = [[] for _ in range(NUM_RANKS)]

    def needs(op, rank, direction, index):
        ahead = 1 if direction == 0 else -1  # the way that a forward goes
        first, last = (0, NUM_RANKS - 1)[::ahead]
        if op == "F":
            return [] if rank == first else [("F", rank - ahead, direction, index)]
        if op == "W":
            return [("I", rank, direction, index)]
        own = ("F", rank, direction, index)
        return [own] if rank == last else [own, ("I", rank + ahead, direction, index)]

    while any(p < len(order) for p, order in zip(position, orders, strict=True)):
        went = False
        for rank, order in enumerate(orders):
            if position[rank] == len(order):
                continue
            step = [(op, rank, *rest) for op, *rest in order[position[rank]]]
            inputs = [need for task in step for need in needs(*task)]
            if any(need not in done for need in inputs):
                continue
            start = max([free[rank], *(done[need] for need in inputs)])
            overlapped = len(step) == 2
            end = start + (OVERLAPPED if overlapped else COSTS[step[0][0]])
            for op, _, direction, index in step:
                # A full backward gives its input gradient, as I does.
                done["I" if op == "B" else op, rank, direction, index] = end
                number = index + direction * NUM_MICROBATCHES // 2
                rows[rank].append(Cell(op, number, direction, overlapped, start, end))
            free[rank], went = end, True
            position[rank] += 1
        assert went, "upstream's order never ends"
    return rows


class Shape(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    fill: str
    stroke: str | None


class Word(NamedTuple):
    x: float
    y: float
    anchor: str
    text: str


def read(svg):
    """Rectangles and texts of an SVG, and nothing invisible."""
    rects, words = [], []
    for item in ElementTree.fromstring(svg):
        get, tag = item.attrib.get, item.tag.rpartition("}")[2]
        if tag == "rect":
            box = (float(get(key, "0")) for key in ("x", "y", "width", "height"))
            rects.append(Shape(*box, get("fill"), get("stroke")))
        elif tag == "text":
            at = float(get("x")), float(get("y"))
            words.append(Word(*at, get("text-anchor"), item.text))
    return rects, words


def legend(rects, words):
    """The colours of (op, direction), by the names beside them."""
    names = {
        "Forward": "F",
        "Backward": "B",
        "Backward for input": "I",
        "Backward for weights": "W",
    }
    note = "(light: direction 0, dark: direction 1)"
    assert any(word.text == note for word in words)
    meaning = {}
    for word in words:
        if word.text in names:
            beside = [
                r for r in rects if r.y < word.y < r.y + r.height and r.x < word.x
            ]
            light, dark = sorted(beside, key=lambda r: r.x)[-2:]
            assert brightness(light.fill) > brightness(dark.fill)
            meaning[light.fill] = names[word.text], 0
            meaning[dark.fill] = names[word.text], 1
    assert len(meaning) == 8
    return meaning


def brightness(colour):
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.6 * green + 0.1 * blue


def cells_of(svg):
    """The cells of a picture: for each rank, from left to right."""
    rects, words = read(svg)
    meaning = legend(rects, words)
    ranks = [w for w in words if re.fullmatch(r"Rank \d+", w.text)]
    below = max(w.y for w in ranks)
    ticks = {int(w.text): w.x for w in words if w.text.isdigit() and w.y > below}
    scale = (ticks[60] - ticks[0]) / 60

    def time(x):
        return round((x - ticks[0]) / scale, 2)  # SVG has two decimals of a pixel

    rows = {}
    for name in ranks:
        row = [r for r in rects if r.y < name.y < r.y + r.height and r.x >= ticks[0]]
        borders = [r for r in row if r.fill == "none" and r.stroke == "#1a1a1a"]
        found = []
        for box in sorted((r for r in row if r.fill in meaning), key=lambda r: r.x):
            (number,) = (
                w.text
                for w in words
                if box.y < w.y < box.y + box.height and box.x < w.x < box.x + box.width
            )
            middle = box.x + box.width / 2
            around = [b for b in borders if b.x < middle < b.x + b.width] or [box]
            assert len(around) == 1
            start, end = time(around[0].x), time(around[0].x + around[0].width)
            op, direction = meaning[box.fill]
            overlapped = around[0] is not box
            found.append(Cell(op, int(number), direction, overlapped, start, end))
        rows[int(name.text.split()[1])] = found
    return [rows[rank] for rank in sorted(rows)]


@pytest.fixture(scope="module")
def published():
    orders = json.loads(DATA.read_text())[f"dualpipe/{NUM_RANKS}/{NUM_MICROBATCHES}"]
    return replay(orders)


def test_every_cell_is_where_the_published_figure_has_it(published):
    drawn = cells_of(show.svg(dualpipe(NUM_RANKS, NUM_MICROBATCHES)))
    assert len(drawn) == NUM_RANKS
    for rank, (row, expected) in enumerate(zip(drawn, published, strict=True)):
        assert row == expected, f"rank {rank}"
    # F and B of every microbatch on every rank, and a W for every I.
    assert sum(map(len, drawn)) == 8 * 20 * 2 + sum(
        c.op == "W" for r in drawn for c in r
    )


def test_the_replay_is_what_the_paper_says_of_it(published):
    """Its bubble is that of the README's table, and both directions are symmetric."""
    end = max(cell.end for row in published for cell in row)
    for row in published:
        steps = {(cell.start, cell.end) for cell in row}
        busy = sum(stop - start for start, stop in steps)
        # (PP/2-1)(F&B+B-3W)
        assert end - busy == (NUM_RANKS // 2 - 1) * (OVERLAPPED + 2 - 3)
    for row, mirrored in zip(published, reversed(published), strict=True):
        half = NUM_MICROBATCHES // 2
        assert row == [
            cell._replace(
                direction=1 - cell.direction,
                microbatch=(cell.microbatch + half) % NUM_MICROBATCHES,
            )
            for cell in mirrored
        ]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a number", lambda svg: svg.replace(">7</text>", ">8</text>", 1)),
        ("a colour", lambda svg: svg.replace('fill="#ffdb94"', 'fill="#94d9c4"', 1)),
        ("a border", lambda svg: svg.replace('stroke="#1a1a1a"', 'stroke="none"', 1)),
        (
            "a place",
            lambda svg: re.sub(r'x="58.00" (y="52.00" width="18)', r'x="59" \1', svg),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cell_that_is_drawn_wrongly_is_found(published, what, change):
    svg = show.svg(dualpipe(NUM_RANKS, NUM_MICROBATCHES))
    assert change(svg) != svg, what
    assert cells_of(change(svg)) != published
