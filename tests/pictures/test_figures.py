"""Figures show the right numbers: bubbles, and timelines of overlap."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.colors import to_hex

from dualpipe_jax import Costs, lower, pictures, simulate
from dualpipe_jax.commands import main as cli
from dualpipe_jax.pictures import TrackSpan
from dualpipe_jax.pictures.intervals import union
from dualpipe_jax.pictures.tracks import split
from dualpipe_jax.schedules.generators.names import SCHEDULES
from eplb_jax import style

DEEPSEEK = Costs(F=97, I=104, W=35, FB=129, p2p=1.2)
TITLES = {
    "DualPipe": "dualpipe",
    "DualPipeV": "dualpipev",
    "1F1B": "1f1b",
    "ZB1P": "zb1p",
    "GPipe": "gpipe",
    "ZB-V": "zbv",
    "V-Half": "v_half",
    "V-Min": "v_min",
    "Interleaved 1F1B": "interleaved_1f1b",
    "Interleaved ZB": "interleaved_zero_bubble",
    "Looped BFS": "looped_bfs",
}
HALVES = ("dualpipev", *list(TITLES.values())[5:])


@pytest.mark.parametrize("lowered", [False, True])
def test_lines_are_what_the_simulator_says(lowered):
    sizes = [4, 7, 8, 9, 16]
    figure = pictures.bubble_ratio(4, sizes, DEEPSEEK, lowered=lowered)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == list(TITLES)
    drawn = {}
    for line in axes.lines:
        name = TITLES[line.get_label()]
        # Two stages per rank: each is half of one.
        costs = DEEPSEEK
        if name in HALVES:
            costs = Costs(F=48.5, I=52, W=17.5, FB=64.5, p2p=1.2)
        for size, percent in zip(*line.get_data(), strict=True):
            schedule = SCHEDULES[name](4, int(size))
            timeline = simulate(lower(schedule) if lowered else schedule, costs)
            assert percent == pytest.approx(100 * timeline.bubble_ratio)
            drawn.setdefault(name, []).append(size)
    # DualPipe: even and at least 2P; DualPipeV: at least 2P.
    assert drawn["dualpipe"] == [8, 16] and drawn["dualpipev"] == [8, 9, 16]
    assert drawn["1f1b"] == drawn["zb1p"] == drawn["gpipe"] == sizes


def test_default_sizes_and_odd_ranks():
    ratios = pictures.bubble_ratios(3)
    assert ratios["dualpipe"] == {} and list(ratios["zb1p"]) == list(range(3, 25))
    assert list(pictures.bubble_ratios(1)["gpipe"]) == list(range(1, 9))
    labels = [line.get_label() for line in pictures.bubble_ratio(3).axes[0].lines]
    assert labels == [title for title in TITLES if title != "DualPipe"]
    assert "-" in pictures.bubble_table(ratios).splitlines()[1].split()[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0,), "num_ranks=0 must be at least 1"),
        (
            (4, [8], Costs(), ["dualpype"]),
            "'dualpype' is unknown; use some of dualpipe,",
        ),
        ((4, [7], Costs(), ["dualpipe"]), "no schedule of dualpipe exists for num_ra"),
    ],
)
def test_bad_sizes(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pictures.bubble_ratios(*args)


def test_bubbles_command_prints_what_the_document_says(capsys):
    text = (Path(__file__).parents[2] / "docs/choosing.md").read_text()
    text = text.replace("\\\n", "")  # one line again
    (block,) = re.findall(
        r"^\$ python -m dualpipe_jax (bubbles.*?)^```", text, re.M | re.S
    )
    command, _, expected = block.partition("\n")
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == expected


def test_bubbles_command_draws_and_refuses(tmp_path, capsys):
    path = tmp_path / "bubbles.svg"
    args = ["bubbles", "--ranks", "2", "--schedules", "1f1b,dualpipe", "--out"]
    assert cli.main([*args, str(path)]) == 0 and not capsys.readouterr().out
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    for wrong in (["--microbatches", "x"], ["--out", str(tmp_path / "a.gifff")]):
        assert cli.main(["bubbles", "--ranks", "2", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda p: (p[0], sum(p))),
    max_size=8,
)


@given(intervals, st.integers(0, 30), st.integers(1, 12))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_parts_of_an_interval_are_covered_as_each_moment_is(covers, begin, length):
    end = begin + length
    parts = split((begin, end), union(covers))
    moments = {}
    for (low, high), covered in parts:
        assert low < high
        moments.update(dict.fromkeys(range(low, high), covered))
    assert moments == {t: any(a <= t < b for a, b in covers) for t in range(begin, end)}
    assert sum(high - low for (low, high), _ in parts) == length


SPANS = [
    TrackSpan("Compute", "gemm", 100, 103, False, "attn(F)"),
    TrackSpan("Compute", "gemm", 103, 106, False, "mlp(F)"),
    TrackSpan("Compute", "gemm", 110, 114, False, "mlp(B)"),
    TrackSpan("Compute", "add", 114, 115, False),
    TrackSpan("NVLink", "all-to-all", 104, 111, True, "combine(F)"),
    TrackSpan("Network", "permute", 101, 102, True),
]


def boxes_of(figure):
    """For each track, (begin, end, colour) of every box on it."""
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    rows = {}
    for name, drawn in zip(names, axes.collections, strict=True):
        rows[name] = [
            (*np.round(path.get_extents().intervalx, 6), to_hex(colour))
            for path, colour in zip(
                drawn.get_paths(), drawn.get_facecolors(), strict=True
            )
        ]
    return rows


def test_a_timeline_shows_what_is_hidden_and_what_is_exposed():
    figure = pictures.timeline(SPANS, title="<t> $x")
    assert boxes_of(figure) == {
        "Compute": [
            (0, 3, style.OPS["F"][0]),
            (3, 6, style.OPS["F"][1]),
            (10, 14, style.OPS["B"][1]),
            (14, 15, style.OTHER),
        ],
        "NVLink": [
            (4, 6, style.HIDDEN),
            (6, 10, style.EXPOSED),
            (10, 11, style.HIDDEN),
        ],
        "Network": [(1, 2, style.HIDDEN)],
    }
    (axes,) = figure.axes
    said = axes.get_title(loc="left")
    assert said == "15.0 µs; 8.0 µs of communication, 50.0 % under compute"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("attn(F)", "mlp(F)", "mlp(B)", "other compute"),
        *("communication under compute", "communication, nothing computed"),
    ]
    assert "combine(F)" in {text.get_text() for text in axes.texts}
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    assert ElementTree.fromstring(stream.getvalue()).tag.endswith("svg")


def test_a_part_of_a_timeline():
    figure = pictures.timeline(SPANS, between=(5, 11))
    assert boxes_of(figure)["Compute"] == [
        (5, 6, style.OPS["F"][1]),
        (10, 11, style.OPS["B"][1]),
    ]
    assert figure.axes[0].get_xlim() == (5, 11)
    with pytest.raises(ValueError, match=r"between=\(20, 30\) holds no span"):
        pictures.timeline(SPANS, between=(20, 30))
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.timeline([])


def trace_span(device, stream, begin, end, is_comm, phase=None):
    return SimpleNamespace(
        device=device,
        stream=stream,
        name="kernel",
        begin_us=begin,
        end_us=end,
        is_comm=is_comm,
        phase=phase,
    )


def test_a_timeline_of_a_trace_is_of_one_device():
    trace = SimpleNamespace(
        title="trace.json",
        spans=(
            trace_span("GPU 0", "27", 0, 4000, True, "dispatch(B)"),
            trace_span("GPU 0", "7", 1000, 3000, False, "attn(B)"),
            trace_span("GPU 1", "other", 0, 9000, True),
        ),
    )
    figure = pictures.timeline(trace)
    assert boxes_of(figure) == {
        "Stream 7": [(1, 3, style.OPS["B"][0])],
        "Stream 27": [
            (0, 1, style.EXPOSED),
            (1, 3, style.HIDDEN),
            (3, 4, style.EXPOSED),
        ],
    }
    assert figure.get_suptitle() == "trace.json"
    assert list(boxes_of(pictures.timeline(trace, device="GPU 1"))) == ["other"]
    with pytest.raises(ValueError, match=r"'GPU 2' is not in .* has GPU 0, GPU 1"):
        pictures.timeline(trace, device="GPU 2")
