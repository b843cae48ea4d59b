"""Pictures are complete, to scale, without overlaps, and in the right colours."""

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib.colors
import matplotlib.image
import pytest
from hypothesis import given, settings, strategies as st

from dualpipe_jax.pictures import picture as _picture, show
from dualpipe_jax.schedules.generators.dualpipe import dualpipe
from dualpipe_jax.schedules.generators.dualpipev import dualpipev
from dualpipe_jax.schedules.generators.gpipe import gpipe
from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
from dualpipe_jax.schedules.generators.zb1p import zb1p
from dualpipe_jax.schedules.schedule import Schedule
from dualpipe_jax.schedules.simulator import Costs, simulate
from eplb_jax import style

KINDS = (dualpipe, dualpipev, one_f_one_b, zb1p, gpipe)
DEEPSEEK = Costs(F=97, I=104, W=35, B=139, FB=129, p2p=1.2)
README = simulate(dualpipe(8, 20))


def task_boxes(picture):
    """For each rank its tasks' boxes from left to right."""
    rows = {}
    for box in picture.boxes:
        if box.tip:
            rows.setdefault(int(re.match(r"Rank (\d+):", box.tip)[1]), []).append(box)
    return [sorted(rows[rank], key=lambda box: box.x) for rank in sorted(rows)]


@given(
    st.sampled_from(KINDS),
    st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_boxes_are_to_scale_and_bubbles_stay_empty(make, costs):
    timeline = simulate(make(4, 8), Costs(*costs))
    picture = _picture.draw(timeline)
    bands = [b for b in picture.boxes if b.fill == style.EMPTY and not b.edge_width]
    assert len(bands) == 4
    scale = bands[0].width / timeline.makespan
    for rank, boxes in enumerate(task_boxes(picture)):
        starts = [box.x for box in boxes]
        ends = [box.x + box.width for box in boxes]
        # Boxes are side by side and never overlap (up to rounding).
        assert all(e <= s + 1e-6 for e, s in zip(ends, starts[1:], strict=False))
        assert {box.y for box in boxes} == {bands[rank].y}
        drawn = sum(box.width for box in boxes)
        assert drawn == pytest.approx(scale * timeline.busy[rank], rel=1e-9)
        first = bands[0].x + scale * timeline.spans[rank][0][1]
        assert starts[0] == pytest.approx(first, rel=1e-9)
    assert all(0 <= b.x <= b.x + b.width <= picture.width for b in picture.boxes)


def test_readme_figure_holds_everything():
    schedule, picture = README.schedule, _picture.draw(README)
    tasks = [task for _, _, step in schedule for task in step]
    rows = task_boxes(picture)
    assert sum(map(len, rows)) == len(tasks)
    for rank, boxes in enumerate(rows):
        drawn = [task for step in schedule.steps[rank] for task in step]
        numbers = sorted(
            (text.x, text.text)
            for text in picture.texts
            if text.anchor == "middle" and boxes[0].y < text.y < boxes[0].y + 22
        )
        assert [number for _, number in numbers] == [str(t.microbatch) for t in drawn]
        for box, (x, number), task in zip(boxes, numbers, drawn, strict=True):
            assert x == pytest.approx(box.x + box.width / 2)
            assert len(number) * 6 < box.width  # 10 px digits are about 6 px wide
            light = task.microbatch < 10
            assert box.fill == style.OPS[task.op][0 if light else 1]
    borders = [box for box in picture.boxes if box.fill == "none"]
    pairs = sum(len(step) == 2 for _, _, step in schedule)
    assert len(borders) == pairs + 1  # and one in the legend
    texts = {text.text for text in picture.texts}
    assert {*_picture.NAMES.values(), "Forward & backward overlapped", "Bubble"} < texts
    assert "DualPipe, 8 ranks, 20 microbatches" in texts
    assert "makespan 66, bubble 6 (9.1 %), at most 9 activations alive" in texts


def test_legend_names_only_what_is_there():
    texts = {text.text for text in _picture.draw(simulate(gpipe(2, 2))).texts}
    assert {"Forward", "Backward", "Bubble"} < texts
    assert not {"Backward for input", "Forward & backward overlapped"} & texts
    assert not any("direction" in text for text in texts)


def test_colours_differ_and_can_be_read():
    colours = [c for pair in style.OPS.values() for c in pair] + [style.EMPTY]
    assert len(set(colours)) == len(colours)

    def luminance(colour):
        parts = matplotlib.colors.to_rgb(colour)
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ink = luminance(style.INK)
    for colour in colours:  # WCAG 2.2, success criterion 1.4.3
        assert (luminance(colour) + 0.05) / (ink + 0.05) >= 4.5
    for light, dark in style.OPS.values():
        assert luminance(light) > luminance(dark)


@pytest.mark.parametrize("costs", [Costs(), DEEPSEEK])
def test_svg_is_well_formed_and_complete(costs):
    timeline = simulate(dualpipe(4, 8), costs)
    root = ElementTree.fromstring(show.svg(timeline))
    name = "{http://www.w3.org/2000/svg}"
    tips = [rect.find(f"{name}title") for rect in root.iter(f"{name}rect")]
    tips = [tip.text for tip in tips if tip is not None]
    assert len(tips) == sum(len(step) for _, _, step in timeline.schedule)
    assert "Rank 0: Forward, stage 0, microbatch 0, direction 0, 0 to" in tips[0]
    assert "overlapped" in show.svg(timeline)


def test_png_shows_the_same_boxes():
    picture = _picture.draw(README)
    pixels = matplotlib.image.imread(io.BytesIO(show.png(README, dpi=200)))
    assert pixels.shape[:2] == (int(picture.height * 2), int(picture.width * 2))
    for boxes in task_boxes(picture):
        for box in boxes:  # beside the number, clear of the border
            pixel = pixels[int(2 * (box.y + 3.5)), int(2 * (box.x + 2.5))]
            # 8-bit colours
            assert matplotlib.colors.to_rgb(box.fill) == pytest.approx(
                tuple(pixel[:3]), abs=1 / 255
            )


@pytest.mark.parametrize("make", KINDS)
def test_text_is_to_scale(make):
    schedule = make(4, 12)
    timeline = simulate(schedule)
    rows = [line for line in show.text(schedule).splitlines() if line[-1:] == "|"]
    assert len(rows) == 4
    for rank, row in enumerate(rows):
        cells = row[row.index("|") + 1 : -1]
        assert len(cells) == 3 * timeline.makespan  # an op and two digits a unit
        for step, start, end in timeline.spans[rank]:
            cell = cells[int(3 * start) : int(3 * end)].rstrip("-")
            assert cell.upper() == "&".join(f"{t.op}{t.microbatch}" for t in step)
            for task, word in zip(step, cell.split("&"), strict=True):
                low = schedule.direction_of(task.stage, task.microbatch) == 1
                assert word.islower() == low
        assert cells.count(".") == 3 * timeline.bubble[rank]


def test_text_with_very_unequal_costs_stays_narrow():
    timeline = simulate(zb1p(2, 3), Costs(F=100, I=100, W=0.01))
    assert max(map(len, show.text(timeline).splitlines())) < 150


def test_nothing_takes_time():
    timeline = simulate(one_f_one_b(2, 2), Costs(F=0, B=0, I=0, W=0))
    for kind in set(show.FORMATS) - {"png"}:
        assert show.FORMATS[kind](timeline)
    assert show.png(timeline)[:4] == b"\x89PNG"


def test_html_is_self_contained():
    class Page(HTMLParser):
        def __init__(self):
            super().__init__()
            self.cells, self.open, self.links = [], None, []

        def handle_starttag(self, tag, attrs):
            self.open = tag
            self.links += [v for k, v in attrs if k in ("src", "href")]

        def handle_data(self, data):
            if self.open == "td":
                self.cells.append(data)
            self.open = None

    page = Page()
    page.feed(show.html(README))
    assert not page.links
    assert page.cells == [
        cell for rank in range(8) for cell in (str(rank), "60", "6", "9")
    ]


def test_notebooks_show_schedules_and_timelines():
    schedule = README.schedule
    assert schedule._repr_html_() == README._repr_html_() == show.html_fragment(README)
    assert README._repr_html_().startswith('<div style="overflow-x: auto"><svg ')


def test_names_are_escaped():
    schedule = Schedule.from_csv("0F0,0B0", kind="<b>&$x$\"'")
    assert "<b>" not in show.svg(schedule) + show.html(schedule)
    root = ElementTree.fromstring(show.svg(schedule))
    assert root.attrib["aria-label"].startswith("<b>&$x$\"', 1 rank, 1 microbatch")
    assert show.png(schedule)[:4] == b"\x89PNG"  # and $ starts no formula


def test_forward_only_says_so():
    text = show.text(dualpipe(2, 4).forward_only())
    assert text.startswith("DualPipe (forward only), 2 ranks, 4 microbatches\n")
    assert "activations" not in text


def test_save_takes_the_format_from_the_suffix(tmp_path):
    schedule = gpipe(2, 2)
    for suffix, kind in [
        ("svg", "svg"),
        ("html", "html"),
        ("csv", "csv"),
        ("txt", "text"),
        ("json", "chrome"),
    ]:
        show.save(schedule, tmp_path / f"a.{suffix}")
        written = (tmp_path / f"a.{suffix}").read_text(encoding="utf-8")
        assert written == show.FORMATS[kind](schedule)
    show.save(schedule, tmp_path / "b", format="png")
    assert (tmp_path / "b").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(
        ValueError, match=r"format='gif' of path=.*use one of text, csv"
    ):
        show.save(schedule, tmp_path / "a.gif")


def test_pictures_need_neither_jax_nor_matplotlib_until_asked():
    code = (
        "import sys, dualpipe_jax.pictures.show;"
        "from dualpipe_jax.schedules.generators.dualpipe import dualpipe;"
        "dualpipe_jax.pictures.show.svg(dualpipe(2, 4));"
        "print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_without_matplotlib_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=r"need matplotlib; pip install 'dualpipe-jax"
    ):
        show.png(README)
