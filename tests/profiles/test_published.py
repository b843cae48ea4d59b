"""DeepSeek's published training profile, read."""

import json
from pathlib import Path

import pytest

from dualpipe_jax import Costs, dualpipe, read_trace, simulate
from dualpipe_jax.commands import main as cli
from dualpipe_jax.pictures.phase_layout import PUBLISHED_MS

PUBLISHED = Path(__file__).parent.parent / "data" / "deepseek_v3_train_trace.json.gz"


@pytest.fixture(scope="module")
def report():
    return read_trace(PUBLISHED)


def test_headline_figures(report):
    # Counted by hand in the published file; the project promises 0.2 %.
    assert report.span_us == pytest.approx(129_012, rel=2e-3)
    assert report.comm_us == pytest.approx(113_440, rel=2e-3)
    assert report.comm_hidden == pytest.approx(0.963, rel=2e-3)
    assert report.compute_busy == pytest.approx(0.964, rel=2e-3)


def test_every_kernel_has_a_phase_and_all_phases_are_there(report):
    assert all(span.phase for span in report.spans)
    parts = ("attn", "dispatch", "mlp", "combine")
    expected = [f"{part}({step})" for step in "FB" for part in parts]
    assert list(report.phases) == [*expected, "attn(W)", "mlp(W)"]
    for name, phase in report.phases.items():
        exchanges = name.startswith(("dispatch", "combine"))
        assert (phase.comm_us > phase.compute_us) == exchanges
        assert 0 <= phase.hidden_us <= phase.comm_us


def test_four_layers_of_each_exchange(report):
    # One dispatch per layer and direction; the forward's has three kernels.
    assert report.phases["dispatch(F)"].num_kernels == 3 * 4
    assert report.phases["combine(F)"].num_kernels == 2 * 4


def test_phases_add_up_to_the_kernels(report):
    by_phase = sum(p.compute_us + p.comm_us for p in report.phases.values())
    assert by_phase == pytest.approx(sum(k.total_us for k in report.kernels))
    assert by_phase == pytest.approx(sum(s.end_us - s.begin_us for s in report.spans))


def test_costs_feed_the_simulator(report):
    costs = report.costs()
    # F is 36 ms of compute and 61 of communication; the pair is the whole profile.
    assert (pytest.approx(97.4, 1e-3), pytest.approx(35.1, 1e-3)) == (costs.F, costs.W)
    assert report.span_us / 1e3 == costs.FB
    assert pytest.approx(111.6, rel=1e-3) == costs.I
    overlapped = simulate(dualpipe(8, 20), costs)
    alone = Costs(F=costs.F, I=costs.I, W=costs.W)
    assert overlapped.makespan < 0.75 * simulate(dualpipe(8, 20), alone).makespan


def test_our_own_traces_have_the_published_proportions(report):
    found = {
        name: (phase.compute_us + phase.comm_us) / 1e3
        for name, phase in report.phases.items()
    }
    assert pytest.approx(found, abs=0.05) == PUBLISHED_MS  # rounded to 0.1 ms


def test_the_command(capsys):
    assert cli.main(["trace", str(PUBLISHED), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert {"span_us", "compute_us", "comm_us", "comm_hidden", "compute_busy"} <= {
        *read
    }
    assert read["phases"]["dispatch(F)"]["num_kernels"] == 12
    assert cli.main(["trace", str(PUBLISHED)]) == 0
    printed = capsys.readouterr().out
    assert "span           129.0 ms" in printed
    assert "113.4 ms  96.3% hidden" in printed
    assert "--costs F=97.39,I=111.6,W=35.07,FB=129" in printed


def test_costs_are_of_one_of_several_chunks(report, capsys):
    assert report.costs(chunks=2).F == report.costs().F / 2
    assert cli.main(["trace", str(PUBLISHED), "--chunks", "0"]) == 2
    assert "chunks=0 must be positive" in capsys.readouterr().err


def test_jupyter_shows_tables(report):
    page = report._repr_html_()
    assert page.count("<table>") == 3 and "attn(W)" in page
    assert "per_token_cast_to_fp8_with_channels&lt;" in page


def test_the_figure(tmp_path, capsys):
    drawn = tmp_path / "trace.svg"
    assert cli.main(["trace", str(PUBLISHED), "--figure", str(drawn)]) == 0
    assert drawn.read_text().count("<path") > 100
    arguments = ["--figure", str(drawn), "--device", "GPU 7"]
    assert cli.main(["trace", str(PUBLISHED), *arguments]) == 2
    assert "device='GPU 7' is not in the trace" in capsys.readouterr().err
