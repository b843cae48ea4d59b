"""The page of a run: what it shows is what was recorded, and it needs nothing else."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest

from dualpipe_jax import dualpipe
from dualpipe_jax.commands import main as cli
from dualpipe_jax.configs import tiny
from dualpipe_jax.pictures import show
from dualpipe_jax.train.report import report_html
from dualpipe_jax.train.report_sections import layer_names
from eplb_jax import style
from tests.train.runs import CONFIG, PUBLISHED, RELOAD, make_records, make_run


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.said, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data):
        if data.strip():
            self.said.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def charts(html):
    """The page's charts by their name, as elements."""
    found = re.findall(r'<svg class="chart".*?</svg>', html, re.S)
    charts = [ElementTree.fromstring(text) for text in found]
    return {chart.attrib["aria-label"]: chart for chart in charts}


def axis(chart, kind, at):
    """Turns a place into a number, by two of an axis's numbers."""
    marks = [
        (
            float(text.attrib[at]) - (4 if at == "y" else 0),
            float(text.text.replace(",", "")),
        )
        for text in chart.iter("text")
        if text.attrib["class"] == kind
    ]
    (low, a), (high, b) = marks[0], marks[-1]
    return lambda place: a + (place - low) * (b - a) / (high - low)


def lines_of(chart):
    """Each line's points, read back from where they are drawn."""
    x, y = axis(chart, "x", "x"), axis(chart, "y", "y")
    lines = {}
    for line in chart.iter("polyline"):
        points = [map(float, p.split(",")) for p in line.attrib["points"].split()]
        lines[line.attrib["data-name"]] = np.array([(x(a), y(b)) for a, b in points])
    return lines


def test_curves_are_the_records(tmp_path):
    records = make_records()
    drawn = charts(report_html(make_run(tmp_path / "a", records)))
    loss = lines_of(drawn["Loss over the steps"])
    rate = lines_of(drawn["Tokens per second over the steps"])
    even = lines_of(drawn["Balancedness over the steps"])
    for line, wanted in (
        (loss["train"], [r["loss"] for r in records]),
        (rate["tokens/s"], [r["tokens_per_s"] for r in records]),
        (even["mean of layers"], [r["balancedness"] for r in records]),
        (even["worst layer"], [min(r["balancedness_layers"]) for r in records]),
        (even["without placement"], [0.25] * 40),
    ):
        # Places have two decimals of a pixel.
        np.testing.assert_allclose(line[:, 0], range(1, 41), atol=2e-3)
        np.testing.assert_allclose(line[:, 1], wanted, rtol=1e-3, atol=1e-4)
    held_out = loss["held out"]
    np.testing.assert_allclose(held_out, [(20, 2.55), (40, 2.525)], rtol=1e-3)
    dots = drawn["Loss over the steps"].iter("circle")
    assert [dot.find("title").text for dot in dots] == [
        "step 20: 2.55",
        "step 40: 2.525",
    ]


def test_many_steps_are_drawn_as_means_with_their_range(tmp_path):
    records = make_records(1000)
    chart = charts(report_html(make_run(tmp_path / "a", records)))[
        "Loss over the steps"
    ]
    line = lines_of(chart)["train"]
    losses = np.array([r["loss"] for r in records])
    means = [losses[i : i + 3].mean() for i in range(0, 1000, 3)]
    np.testing.assert_allclose(line[:, 1], means, rtol=2e-3)
    assert len(line) == 334 and chart.find("polygon") is not None
    # Of held-out losses each one is there.
    assert len(list(chart.iter("circle"))) == 50


def test_the_heatmap_is_the_layers_over_the_steps(tmp_path):
    records = make_records()
    chart = charts(report_html(make_run(tmp_path / "a", records)))
    chart = chart["Balancedness of each layer"]
    (image,) = chart.iter("image")
    head, _, data = image.attrib["href"].partition(",")
    assert head == "data:image/png;base64"
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
    assert pixels.shape == (4, 40, 3)
    values = np.array([r["balancedness_layers"] for r in records])
    low = np.floor(10 * values.min()) / 10
    for (step, layer), value in np.ndenumerate(values):
        wanted = style.rgb(style.scale((value - low) / (1 - low)))
        np.testing.assert_allclose(pixels[layer, step], wanted, atol=0.005)  # 8 bits
    step, (left, width) = (
        axis(chart, "x", "x"),
        (float(image.attrib[name]) for name in ("x", "width")),
    )
    places = [step(left), step(left + width)]
    np.testing.assert_allclose(places, [0.5, 40.5], atol=2e-3)
    texts = [text.text for text in chart.iter("text")]
    assert texts[-6:-2] == ["layer 2", "layer 3", "layer 4", "MTP"]
    assert f"{low:.1f}" in texts


def test_numbers_in_text(tmp_path):
    records = make_records()
    page = Page(report_html(make_run(tmp_path / "a", records)))
    last = records[-1]
    for said in (
        "tiny",
        f"{last['loss']:.3f}",
        f"{last['held_out_loss']:.3f}",
        "1,021",  # the median of tokens/s
        f"{last['balancedness']:.3f}",
        "7.7%",
        "pp=4 x ep=2",
        "8 microbatches x 4 sequences x 128 tokens = 4,096 tokens per step",
        "163,840 so far",
        "61.2 s",
        "8 x cpu",
        "2.525",
    ):
        assert said in page.said, said
    assert any(s.startswith("40 of 40 steps; done. Written 20") for s in page.said)
    seconds = sum(4096 / r["tokens_per_s"] for r in records)
    assert f"{round(seconds / 60)} min" in page.said


def test_the_page_needs_nothing_else(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "schedule.svg").write_text(show.svg(dualpipe(4, 8)))
    (folder / "sample.txt").write_text("x <= y && z")
    page = Page(report_html(folder))
    for tag, attrs in page.tags:
        assert tag not in {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
        }
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in {"src", "href", "srcset", "data", "action", "xlink:href"}:
                assert value.startswith("data:")
            elif name != "xmlns":
                assert "://" not in (value or "")
    (css,) = re.findall(r"<style>(.*?)</style>", report_html(folder), re.S)
    assert "url(" not in css and "@import" not in css
    assert "x <= y && z" in page.said
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        page.all("meta")
    )
    assert "DualPipe, 4 ranks, 8 microbatches" in page.said  # the schedule


@pytest.mark.parametrize("state", ["running", "done", "stopped by SIGTERM", None])
def test_only_an_unfinished_run_reloads_its_page(tmp_path, state):
    html = report_html(make_run(tmp_path / "a", state=state))
    assert (RELOAD in html) == (state == "running")
    assert ("not finished" in html) == (state == "running")


HOSTILE = '<script>alert("1")</script>\'&'


def test_hostile_names_are_text(tmp_path):
    config = CONFIG | {
        "name": HOSTILE,
        "schedule": HOSTILE,
        "mesh": {HOSTILE: HOSTILE},
        "model": HOSTILE,
        HOSTILE: HOSTILE,
    }
    folder = make_run(tmp_path / "a", config=config)
    facts = dict.fromkeys(("state", "devices", "data", "unit", "model"), HOSTILE)
    facts["versions"] = {HOSTILE: HOSTILE}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "sample.txt").write_text(HOSTILE)
    (folder / "profile").mkdir()
    estimate = json.loads(ESTIMATE)
    estimate["gpu"] = estimate["loops"][0]["name"] = HOSTILE
    (folder / "overlap.json").write_text(json.dumps(estimate))
    html = report_html(folder)
    page = Page(html)
    assert not page.all("script") and "<script" not in html
    assert page.said.count(HOSTILE) >= 6
    # Values of the wrong kind show nothing, and break nothing.
    strange = {"loss": HOSTILE, "tokens_per_s": None, "balancedness_layers": [HOSTILE]}
    records = [{"step": 1, **strange}, {"step": 2, "loss": float("nan")}]
    html = report_html(make_run(tmp_path / "b", records, config={"mesh": [1]}))
    assert "No finite value yet" in html and "<script" not in html


@pytest.mark.parametrize(
    "svg",
    [
        '<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg" onload="1"></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg"><rect style="fill: url(http://a)"/></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg"><image href="http://a"/></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg"><a:script xmlns:a="a"/></svg>',
        '<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>',
        "<svg><!-- --><rect></svg>",
        "no picture",
    ],
)
def test_a_schedule_that_we_did_not_draw_is_left_out(tmp_path, svg):
    folder = make_run(tmp_path / "a")
    (folder / "schedule.svg").write_text(svg)
    html = report_html(folder)
    assert "schedule.svg is not a picture that train draws" in html
    assert "http://a" not in html and "onload" not in html


def test_exact_balance_has_charts_of_its_own(tmp_path):
    exact = {
        "balancedness_exact": 1.0,
        "balancedness_before": 0.5,
        "fetched_mib": 3.0,
        "dispatched_mib": 12.0,
    }
    records = [record | exact for record in make_records()]
    found = charts(report_html(make_run(tmp_path, records)))
    for title, names in (
        ("Balancedness of the microbatches", {"planned", "at home"}),
        ("MiB sent over the steps", {"weights fetched", "tokens to other devices"}),
    ):
        assert set(lines_of(found[title])) == names


def test_runs_without_values_by_layer_and_without_experts(tmp_path):
    html = report_html(make_run(tmp_path / "a", make_records(layers=False), state=None))
    assert "recorded no values for each layer" in html
    assert set(lines_of(charts(html)["Balancedness over the steps"])) == {
        *("mean of layers", "without placement")
    }
    html = report_html(make_run(tmp_path / "b", [{"step": 1, "loss": 2.0}], config={}))
    assert "Balancedness" not in html and "step 1; done. Written" in html
    (dot,) = charts(html)["Loss over the steps"].iter("circle")
    assert dot.find("title").text == "step 1: 2"


ESTIMATE = json.dumps(
    {
        "gpu": "NVIDIA H100",
        "gpus_per_node": 8,
        "steady_state": "body",
        "loops": [
            {
                "name": name,
                "kind": "while",
                "makespan_s": 0.004,
                "compute": {"seconds": 0.003},
                "communication_s": 0.002,
                "hidden_s": 0.0015,
                "exposed_s": 0.0005,
                "hidden_fraction": 0.75,
            }
            for name in ("entry", "body")
        ],
    }
)


def test_overlap_is_estimated_or_it_is_said_how(tmp_path):
    folder = make_run(tmp_path / "a")
    said = f"python -m dualpipe_jax overlap CONFIG --json &gt; {folder}/overlap.json"
    assert said in report_html(folder)
    (folder / "overlap.json").write_text(ESTIMATE)
    said = Page(report_html(folder)).said
    first = said.index("body (while)")
    assert said[first + 1 : first + 7] == [
        *("4.000 ms", "3.000 ms", "2.000 ms", "1.500 ms", "0.500 ms", "75.0%")
    ]
    assert first < said.index("entry (while)")
    assert not any("overlap is not known" in text for text in said)
    # Such as one that is being written: the rest of the page is there.
    for text in ("", '{"loops": 1}'):
        (folder / "overlap.json").write_text(text)
        assert "overlap.json is not what overlap --json prints" in report_html(folder)


def test_overlap_that_was_measured(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "profile").mkdir()
    assert "The profile cannot be read: " in report_html(folder)
    shutil.copy(PUBLISHED, folder / "profile" / "host.trace.json.gz")
    page = Page(report_html(folder))
    # What DeepSeek's published trace comes to: see tests/profiles/test_published.py.
    assert "Measured: 96.3% of 113.4 ms communication hidden, devices compute in " in (
        " ".join(text for text in page.said if text.startswith("Measured"))
    )
    (image,) = page.all("img")
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    pixels = matplotlib.image.imread(io.BytesIO(data))
    exposed = np.abs(pixels[..., :3] - style.rgb(style.EXPOSED)).max(axis=-1) < 0.01
    hidden = np.abs(pixels[..., :3] - style.rgb(style.HIDDEN)).max(axis=-1) < 0.01
    assert 0.01 < exposed.sum() / (exposed.sum() + hidden.sum()) < 0.08
    assert {"attn(F)", "dispatch(B)", "combine(F)"} <= set(page.said)
    # It takes long to read: not while the run trains.
    page = Page(report_html(folder, live=True))
    assert not page.all("img") and any("when the run has end" in s for s in page.said)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not the folder of a run: it has no metrics.jsonl"),
        ({"metrics.jsonl": ""}, "metrics.jsonl has no record yet"),
        ({"metrics.jsonl": '{"step": 1'}, "metrics.jsonl has no record yet"),
        ({"metrics.jsonl": "a\n"}, "metrics.jsonl has a line that is not JSON"),
        ({"metrics.jsonl": "[]\n"}, "has a record without a step"),
        (
            {"metrics.jsonl": '{"step": 1}\n', "config.json": "{"},
            "config.json is not JSON",
        ),
        (
            {"metrics.jsonl": '{"step": 1}\n', "run.json": "[]"},
            "does not hold a JSON object",
        ),
    ],
)
def test_what_is_no_run_is_said_in_one_line(tmp_path, files, message, capsys):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["report", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


def test_the_command_writes_the_page(tmp_path, capsys):
    folder = make_run(tmp_path / "a")
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    out = tmp_path / "b.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    clock = re.compile(r"Written [-\d: ]* UTC")
    first, second = out.read_text(), (folder / "report.html").read_text()
    assert clock.sub("", first) == clock.sub("", second)
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "no" / "c")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_layers_have_the_names_that_the_config_gives_them():
    config = json.loads(tiny.config().to_json())
    assert layer_names(config, 5) == [f"layer {i}" for i in range(1, 6)]
    assert layer_names(config, 6)[-1] == "MTP"
    assert layer_names({}, 2) == ["0", "1"]
