"""Runs of seconds: what they record, how they resume, and how they end."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from dualpipe_jax import lower, simulate
from dualpipe_jax.train import Programs, Text, loop, make_programs, train
from dualpipe_jax.train.metrics import MetricsLog, draw_loss, read_metrics
from dualpipe_jax.train.model import Transformer
from tests.train import tiny

pytestmark = pytest.mark.slow  # they share one program, which takes its time

TEXT = Text(
    train=np.tile(np.arange(64, dtype=np.uint8), 50),
    held_out=np.tile(np.arange(64, dtype=np.uint8), 5),
    source="counting",
)


COMPILED = {}


def compiled_once(config):
    """`make_programs`, but runs of one model share what is compiled.

    They share the first run's learning rates too, which no test here minds.
    """
    if config.model not in COMPILED:
        programs = make_programs(config)
        if config.model != tiny.config().model:
            return programs
        COMPILED[config.model] = programs.compile()
    programs = COMPILED[config.model]
    return Precompiled(**vars(programs))


class Precompiled(Programs):
    def compile(self):
        return self


@pytest.fixture(autouse=True, scope="module")
def _share_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_programs", compiled_once)
        yield


def run(folder, *, resume=False, **changes):
    config = dataclasses.replace(tiny.config(), **changes)
    console = Console(file=io.StringIO(), width=200)
    result = train(config, TEXT, folder, resume=resume, console=console)
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run from start to end: its folder, result and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    return folder, *run(folder)


def without_clock(records):
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records]


def test_a_run_learns_and_records_every_step(finished):
    folder, result, _ = finished
    config = tiny.config()
    records = read_metrics(folder / "metrics.jsonl")
    assert records == result.metrics and result.stopped_by is None
    assert [r["step"] for r in records] == list(range(1, config.num_steps + 1))
    # It fell by 2.5 nats when this was written; other versions sum in other orders.
    assert records[-1]["loss"] < records[0]["loss"] - 1.5
    # Fewer than two steps' worth of learning apart: it is the same counting.
    assert abs(result.held_out_loss - records[-1]["loss"]) < 1
    assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
    bubble = simulate(lower(config.schedule(2, 4))).bubble_ratio
    for record in records:
        assert record["pipeline_bubble_ratio"] == bubble
        assert record["tokens_per_s"] > 0 and record["grad_norm"] > 0
    assert records[1]["learning_rate"] == pytest.approx(3e-2)


def test_a_run_leaves_its_config_and_pictures(finished):
    folder, _, printed = finished
    assert json.loads((folder / "config.json").read_text())["name"] == "tiny"
    assert "<svg" in (folder / "schedule.svg").read_text()
    for name in ("schedule.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "dualpipe on pp=2 x dp=1, counting" in printed
    assert "step 8/8" in printed and "tokens/s" in printed and "bubble" in printed


def test_a_resumed_run_continues_bit_for_bit(finished, tmp_path, monkeypatch):
    # Ends as a kill would, after step 4; the last checkpoint is of step 3.
    original = loop._steps

    def interrupted(*args):
        for state, record in original(*args):
            yield state, record
            if record["step"] == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.undo()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    result, _ = run(tmp_path, resume=True)
    assert without_clock(result.metrics) == without_clock(finished[1].metrics)


def test_an_earlier_run_is_moved_aside(finished, tmp_path):
    (tmp_path / "mine.txt").write_text("not a run's file")
    run(tmp_path, num_steps=1)
    _, printed = run(tmp_path, num_steps=2)
    assert "earlier run's files are now in" in printed
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert len(read_metrics(tmp_path / "previous-1" / "metrics.jsonl")) == 1
    assert (tmp_path / "previous-1" / "checkpoints").is_dir()
    assert (tmp_path / "mine.txt").exists()
    # A finished run that is resumed has nothing left to do, and keeps its record.
    result, _ = run(tmp_path, resume=True, num_steps=2)
    assert result.step == 2 and len(result.metrics) == 2


def test_a_signal_saves_and_stops(tmp_path, monkeypatch):
    original = loop._steps

    def signalled(*args):
        for state, record in original(*args):
            if record["step"] == 2:
                loop.signal.raise_signal(loop.signal.SIGTERM)
            yield state, record

    before = loop.signal.getsignal(loop.signal.SIGTERM)
    monkeypatch.setattr(loop, "_steps", signalled)
    result, _ = run(tmp_path)
    assert (result.step, result.stopped_by) == (2, "SIGTERM")
    assert loop.signal.getsignal(loop.signal.SIGTERM) == before
    monkeypatch.undo()
    result, _ = run(tmp_path, resume=True, num_steps=3)
    assert [r["step"] for r in result.metrics] == [1, 2, 3]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    def diverging(config):
        def train_step(state, inputs, targets):
            return state, {"loss": float("nan")}

        return dataclasses.replace(compiled_once(config), train_step=train_step)

    monkeypatch.setattr(loop, "make_programs", diverging)
    with pytest.raises(FloatingPointError, match=r"loss=nan at step=1; lower the"):
        run(tmp_path)


def test_what_cannot_be_resumed_is_refused_before_compiling(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop.Programs, "compile", None)
    with pytest.raises(ValueError, match=r"no checkpoint in .*nothing; start a run"):
        run(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no checkpoint in .*empty.*; start a run"):
        run(tmp_path / "empty", resume=True)
    wider = Transformer(width=32, hidden=32, num_heads=2, num_layers=2)
    with pytest.raises(ValueError, match=r"step 8 .* is of another model .*embed"):
        run(finished[0], resume=True, model=wider)
    deeper = dataclasses.replace(tiny.config().model, num_layers=4)
    with pytest.raises(ValueError, match=r"is of another model .*layers/1"):
        run(finished[0], resume=True, model=deeper)


def test_metrics_that_were_cut_off_are_read_as_far_as_they_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0})
            assert len(read_metrics(path)) == step  # flushed
    path.write_text(path.read_text() + '{"step": 4, "lo')
    with MetricsLog(path, keep_until=2):
        pass
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_the_loss_curve_needs_no_held_out_loss_and_no_step(tmp_path):
    draw_loss([], tmp_path / "empty.png")
    draw_loss([{"step": 1, "loss": 2.0}], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
