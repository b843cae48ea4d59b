"""The estimated timeline as a Chrome trace, and phases in DeepSeek's names."""

import json

import pytest

from dualpipe_jax import overlap_report
from dualpipe_jax.pictures.phases import phase
from tests.gpu.overlap.modules import (
    GEMM,
    HALF,
    PERMUTE,
    all_to_all_done,
    all_to_all_start,
    copy,
    gemm,
    loop,
    module,
    permute_done,
    permute_start,
    run_loop,
)


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/while/body/jvp(attn)/dot_general", "attn(F)"),
        ("jit(step)/attn/dot_general", "attn(F)"),
        ("jit(step)/transpose(jvp(mlp))/dot_general", "mlp(B)"),
        ("jit(step)/W/transpose(jvp(mlp))/dot_general", "mlp(W)"),
        ("jit(step)/transpose(jvp(attn))/wgrad/dot_general", "attn(W)"),
        ("jit(step)/jvp(moe)/dispatch/all_to_all", "dispatch(F)"),
        ("jit(step)/transpose(jvp(moe))/combine/all_to_all", "combine(B)"),
        ("jit(step)/jvp(experts)/while/body/dot_general", "mlp(F)"),
        ("jit(step)/while/body/add", None),
        ("jit(attn_step)/add", None),
        ("", None),
    ],
)
def test_phases(op_name, expected):
    assert phase(op_name) == expected


def named(line, op_name):
    return f'{line}, metadata={{op_name="{op_name}"}}'


@pytest.fixture
def report():
    lines = "\n".join(
        [
            named(copy("rows"), "step/jvp(dispatch)/gather"),
            # XLA has dropped the name of this all-to-all.
            all_to_all_start("a", operand="rows"),
            named(permute_start("p"), "step/ppermute"),
            named(gemm("g"), "step/transpose(jvp(mlp))/dot_general"),
            all_to_all_done("a"),
            permute_done("p"),
            copy("nameless"),
        ]
    )
    text = module(run_loop("body", 3), loop("body", lines))
    return overlap_report(text, **HALF)


def test_the_trace_shows_the_timeline(report, tmp_path):
    trace = report.chrome_trace(path=tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == trace
    tracks = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert set(tracks.values()) == {"Compute", "NVLink", "Network"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    shown = {event["name"]: (tracks[event["tid"]], event) for event in spans}
    assert list(shown) == ["dispatch(F)", "ppermute", "mlp(B)", "nameless"]
    # Microseconds; the product covers the permute that starts with it.
    assert shown["mlp(B)"][1]["dur"] == pytest.approx(GEMM * 1e6)
    assert shown["mlp(B)"][1]["ts"] == shown["ppermute"][1]["ts"]
    assert shown["ppermute"][0] == "Network"
    assert shown["ppermute"][1]["dur"] == pytest.approx(PERMUTE * 1e6)
    end = max(event["ts"] + event["dur"] for event in spans)
    assert end == pytest.approx(report.steady_state.makespan_s * 1e6)
    assert report.timeline().makespan == report.steady_state.makespan_s


def test_events_have_what_perfetto_needs(report):
    for event in report.chrome_trace("body")["traceEvents"]:
        assert event["ph"] in "MX" and event["pid"] == 0
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= 0 and event["cat"]


def test_an_all_to_all_without_a_name_takes_its_neighbours_phase(report):
    names = {each.name: each.phase for each in report.collectives}
    assert names == {"a": "dispatch(F)", "p": "ppermute"}
