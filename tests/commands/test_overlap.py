"""The overlap command."""

import json
from pathlib import Path

import pytest

from dualpipe_jax import overlap_report
from dualpipe_jax.commands import main as cli
from dualpipe_jax.commands.overlap import parse_trips
from tests.gpu.overlap.modules import (
    copy,
    loop,
    module,
    permute_done,
    permute_start,
    run_loop,
)


@pytest.fixture
def path(tmp_path):
    lines = f"{permute_start('p')}\n{run_loop('inner')}\n{permute_done('p')}"
    text = module(run_loop("body", 5), loop("inner", copy("k")), loop("body", lines))
    path = tmp_path / "step.hlo"
    path.write_text(text)
    return str(path)


def test_prints_the_report_of_a_module(path, capsys):
    assert cli.main(["overlap", path, "--gpu", "h800"]) == 0
    printed = capsys.readouterr().out
    assert "steady state body" in printed and "NVIDIA H800" in printed


def test_json_trace_and_options(path, capsys, tmp_path):
    trace = tmp_path / "trace.json"
    args = ["--json", "--trace", str(trace), "--trips", "inner=9", "--efficiency", "1"]
    args += ["--gpus-per-node", "16", "--loop", "body"]
    assert cli.main(["overlap", path, *args]) == 0
    read = json.loads(capsys.readouterr().out)
    assert (read["gpus_per_node"], read["efficiency"]) == (16, 1.0)
    (permute,) = read["loops"][0]["collectives"]
    assert (permute["link"], permute["under"]["kernels"]) == ("nvlink", 9)
    assert json.loads(trace.read_text())["traceEvents"]


def test_the_figure_is_the_estimated_timeline(path, capsys, tmp_path):
    drawn = tmp_path / "overlap.png"
    assert cli.main(["overlap", path, "--figure", str(drawn)]) == 0
    assert drawn.read_bytes()[1:4] == b"PNG"
    report = overlap_report(Path(path).read_text(), gpu="h100")
    done = report.timeline()
    assert [(s.begin, s.end) for s in report.spans] == [
        pytest.approx((1e6 * span.begin, 1e6 * span.end)) for span in done.spans
    ]
    assert {(s.track, s.is_comm) for s in report.spans} == {
        ("Compute", False),
        ("Network", True),
    }
    title = report.figure().axes[0].get_title(loc="left")
    hidden = report.steady_state.hidden_fraction
    assert f"{hidden:.1%} of" in title
    assert title.partition(": ")[2] in report.summary()
    (permute,) = [span for span in report.spans if span.is_comm]
    under = sum(
        max(0, min(span.end, permute.end) - max(span.begin, permute.begin))
        for span in report.spans
        if not span.is_comm
    )
    assert under == pytest.approx(1e6 * report.steady_state.hidden_s)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trips", "inner"], "--trips 'inner' must be BODY=N"),
        (["--trips", "inner=-1"], "with N at least 0"),
        (["--efficiency", "2"], "efficiency=2.0 must be above 0"),
        (["--loop", "none"], "name='none' matches 0"),
        (["--gpu", "h1000"], "invalid choice: 'h1000'"),
    ],
)
def test_bad_input_in_one_line(path, args, message, capsys):
    try:
        status = cli.main(["overlap", path, *args])
    except SystemExit as exit_:
        status = exit_.code
    printed = capsys.readouterr()
    assert status == 2 and not printed.out
    assert message in printed.err and printed.err.count("\n") == 1


def test_no_such_config(capsys):
    assert cli.main(["overlap", "no_such_config"]) == 2
    assert "'no_such_config' not found" in capsys.readouterr().err


def test_trips_are_patterns_with_numbers():
    assert parse_trips(["a.*=3", "b=c=1.5"]) == {"a.*": 3.0, "b=c": 1.5}


@pytest.mark.slow
def test_a_config_is_compiled_for_gpus(capsys):
    config = str(Path(__file__).parent.parent / "train" / "tiny.py")
    assert cli.main(["overlap", config, "--json", "--gpu", "a100"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert (read["module"], read["gpu"]) == ("jit_train_step", "NVIDIA A100 80GB")
    kinds = {each["kind"] for loop in read["loops"] for each in loop["collectives"]}
    assert "collective-permute" in kinds
