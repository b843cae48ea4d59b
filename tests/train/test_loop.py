"""Runs of seconds: what they record, how they resume, and how they end."""

import dataclasses
import json
import math
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax import lower, read_trace, simulate
from dualpipe_jax.files import Lock
from dualpipe_jax.profiles.events import read_events
from dualpipe_jax.profiles.reading import find_trace
from dualpipe_jax.tokens import NumberTokenizer, PublishedTokenizer
from dualpipe_jax.train import TOKENIZER, Text, data, folder as folder_module, loop
from dualpipe_jax.train.metrics import draw_loss, read_metrics
from tests.tokens.small import small_tokenizer
from tests.train import cheap
from tests.train.cheap_runs import TEXT, run, without_clock

pytestmark = pytest.mark.usefixtures("collect_garbage", "cheap_programs")


def test_a_run_learns_and_records_every_step(finished):
    folder, result, _ = finished
    config = cheap.config()
    records = read_metrics(folder / "metrics.jsonl")
    assert records == result.metrics and result.stopped_by is None
    assert [r["step"] for r in records] == list(range(1, config.num_steps + 1))
    assert records[-1]["loss"] < records[0]["loss"] - 1
    # Fewer than two steps' worth of learning apart: it is the same counting.
    assert abs(result.held_out_loss - records[-1]["loss"]) < 1
    assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
    bubble = simulate(lower(cheap.CheapPrograms(config).schedule)).bubble_ratio
    for record in records:
        assert record["pipeline_bubble_ratio"] == bubble
        assert record["tokens_per_s"] > 0 and record["grad_norm"] > 0
    assert result.save_failure is None and result.sample is None


def test_a_run_leaves_its_config_and_pictures(finished):
    folder, _, printed = finished
    assert json.loads((folder / "config.json").read_text())["name"] == "cheap"
    assert "<svg" in (folder / "schedule.svg").read_text()
    for name in ("schedule.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "dualpipe on pp=2" in printed and ", counting; compiled" in printed
    assert "step 8/8" in printed and "tokens/s" in printed and "bubble" in printed
    assert not (folder / "sample.txt").exists()
    facts = json.loads((folder / "run.json").read_text())
    assert facts["state"] == "done" and facts["devices"] == "2 x cpu (cpu)"
    assert facts["compile_s"] > 0 and facts["versions"]["jax"] == jax.__version__
    page = (folder / "report.html").read_text()
    assert "8 of 8 steps; done" in page and 'http-equiv="refresh"' not in page
    assert "DualPipe, 2 ranks, 4 microbatches" in page and "counting" in page


def test_the_page_of_a_run_is_there_while_it_runs(tmp_path, after_step):
    pages = []

    def look(step):
        path = tmp_path / "report.html"
        pages.append(path.read_text() if path.exists() else "")

    after_step(look)
    run(tmp_path, num_steps=3)
    # Written after the first step, and not every ten milliseconds.
    assert pages[0] == "" and pages[1] == pages[2]
    assert "1 of 3 steps; not finished" in pages[1]
    assert 'http-equiv="refresh"' in pages[1]
    page = (tmp_path / "report.html").read_text()
    assert "3 of 3 steps; done" in page and 'http-equiv="refresh"' not in page


def test_metrics_with_an_axis_are_recorded_as_lists(tmp_path, monkeypatch):
    class Layered(cheap.CheapPrograms):
        def train_step(self, state, inputs, targets):
            state, metrics = super().train_step(state, inputs, targets)
            layers = np.float32([0.123456, 1])
            return state, metrics | {"loss": np.float32(2.5), "layers": layers}

    monkeypatch.setattr(loop, "make_programs", Layered)
    run(tmp_path, num_steps=1)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": 2.5, ' in line and '"layers": [0.1235, 1.0]' in line


def test_a_resumed_run_continues_bit_for_bit(finished, tmp_path, after_step):
    # Ends as a kill would, in step 5; the last checkpoint is of step 3.
    def interrupt(step):
        if step == 5:
            raise KeyboardInterrupt

    after_step(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    result, _ = run(tmp_path, resume=True, num_steps=4)
    assert len(result.metrics) == 4
    after_step(lambda step: None)
    result, _ = run(tmp_path, resume=True)
    assert without_clock(result.metrics) == without_clock(finished[1].metrics)


def test_another_batch_size_goes_on_behind_the_last_sequence(tmp_path, monkeypatch):
    seen = []
    original = data.train_batch

    def record(text, shape, *args, position, **kwargs):
        seen.append((position, position + shape[0] * shape[1]))
        return original(text, shape, *args, position=position, **kwargs)

    monkeypatch.setattr(data, "train_batch", record)
    size = cheap.config().num_microbatches * cheap.config().microbatch_size
    run(tmp_path, num_steps=3)
    run(tmp_path, num_steps=5, resume=True, microbatch_size=4)
    assert [start for start, _ in seen] == [0, *(end for _, end in seen[:-1])]
    assert seen[2][1] == 3 * size and seen[3][1] - seen[3][0] != size


def test_a_run_that_may_resume_begins_where_there_is_no_checkpoint(
    tmp_path, after_step
):
    # As a kill during the first checkpoint leaves it.
    def interrupt(step):
        if step == 2:
            raise SystemExit

    after_step(interrupt)
    with pytest.raises(SystemExit):
        run(tmp_path, resume=True)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "damaged-3-1").mkdir()
    (tmp_path / "run.json").write_text('{"state": "running"}')
    after_step(lambda step: None)
    result, printed = run(tmp_path, resume=True, num_steps=3)
    assert f"no checkpoint in {tmp_path} yet: the run begins" in printed
    assert [record["step"] for record in result.metrics] == [1, 2, 3]
    assert not (tmp_path / "previous-1").exists()
    result, printed = run(tmp_path, resume="must", num_steps=2)
    assert "continues after step=3; num_steps=2 leaves nothing to do" in printed
    assert result.step == 3
    # The record of a run that has ended is kept, whatever became of its checkpoints.
    shutil.rmtree(tmp_path / "checkpoints")
    _, printed = run(tmp_path, resume=True, num_steps=1)
    assert f"the earlier run's files are now in {tmp_path / 'previous-1'}" in printed
    assert len(read_metrics(tmp_path / "previous-1" / "metrics.jsonl")) == 3


@pytest.mark.parametrize("number", range(7))
def test_a_kill_while_an_earlier_run_is_moved_mixes_nothing(number, tmp_path):
    def write(what):
        for name in folder_module.ARTEFACTS:
            (tmp_path / name).mkdir() if name == "checkpoints" else None
            path = tmp_path / name / "8" if name == "checkpoints" else tmp_path / name
            path.write_text(json.dumps({"state": "done", "run": what}))

    write("first")
    # Ended by a kill after so many files.
    (tmp_path / "previous-1").mkdir()
    for name in folder_module.ARTEFACTS[:number]:
        (tmp_path / name).rename(tmp_path / "previous-1" / name)
    said = []
    lock = Lock(tmp_path)
    resume = number > 0  # a cluster's manager starts it again; before, it would go on
    assert not folder_module.prepare(tmp_path, lock, resume, said.append)
    lock.release()
    assert said[-1].endswith("are now in " + str(tmp_path / "previous-1"))
    shutil.rmtree(tmp_path / "checkpoints")
    write("second")
    assert not folder_module.prepare(tmp_path, lock, False, said.append)
    lock.release()
    for name, what in ("previous-1", "first"), ("previous-2", "second"):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert len(files) == len(folder_module.ARTEFACTS)
        assert {json.loads(path.read_text())["run"] for path in files} == {what}


def test_a_folder_in_use_is_refused_and_nothing_is_touched(tmp_path, after_step):
    def intrude(step):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for resume in (False, True):
            with pytest.raises(
                ValueError, match=rf"in use by .*\(process {os.getpid()}"
            ):
                run(tmp_path, resume=resume)
        assert before == {p: p.read_bytes() for p in before}

    after_step(intrude)
    assert run(tmp_path, num_steps=1)[0].step == 1
    # A lock that a killed process has left holds nobody up.
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "another"}\n')
    after_step(lambda step: None)
    assert run(tmp_path, num_steps=2, resume="must")[0].step == 2


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


def test_a_signal_saves_and_stops(tmp_path, after_step):
    before = signal.getsignal(signal.SIGTERM)
    after_step(lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
    result, _ = run(tmp_path)
    assert (result.step, result.stopped_by) == (2, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before
    after_step(lambda step: None)
    result, _ = run(tmp_path, resume=True, num_steps=3)
    assert [r["step"] for r in result.metrics] == [1, 2, 3]


def test_another_seed_and_other_data_are_told_on_resuming(tmp_path):
    run(tmp_path, num_steps=1)
    others = {
        "seed=1, not 0": {"seed": 1},
        "sequence_length=8, not 16": {"sequence_length": 8},
        "other data: other, not counting": {
            "text": dataclasses.replace(TEXT, train=TEXT.train[::-1], source="other")
        },
    }
    for turn, (told, change) in enumerate(others.items()):
        folder = tmp_path / str(turn)
        shutil.copytree(tmp_path / "checkpoints", folder / "checkpoints")
        _, printed = run(folder, resume=True, num_steps=2, **change)
        assert f"continues after step=1 with {told}: the data comes in anoth" in printed
        # That run is of the other order from now on.
        _, printed = run(folder, resume=True, num_steps=3, **change)
        assert "order" not in printed
    same = dataclasses.replace(TEXT, train=TEXT.train.astype(np.int64), source="moved")
    _, printed = run(tmp_path, resume=True, num_steps=2, text=same)
    assert "order" not in printed


def test_what_cannot_be_resumed_is_refused_before_compiling(
    finished, tmp_path, monkeypatch
):
    class Other(cheap.CheapPrograms):
        def __init__(self, config):
            super().__init__(config, size=128)

    monkeypatch.setattr(cheap.CheapPrograms, "compile", None)
    with pytest.raises(ValueError, match=r"no checkpoint in .*nothing; start a run"):
        run(tmp_path / "nothing", resume="must")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no checkpoint in .*empty.*; start a run"):
        run(tmp_path / "empty", resume="must")
    with pytest.raises(ValueError, match=r"resume='no' must be False, True or 'must'"):
        run(tmp_path / "nothing", resume="no")
    config_before = (finished[0] / "config.json").read_text()
    monkeypatch.setattr(loop, "make_programs", Other)
    with pytest.raises(ValueError, match=r"the checkpoint is of 256 tokens"):
        run(finished[0], resume=True, name="other")
    assert (finished[0] / "config.json").read_text() == config_before


@pytest.mark.parametrize(
    ("num_steps", "asked", "profiled"),
    [(8, 2, [3, 4]), (8, 7, [2, 3, 4, 5, 6, 7, 8]), (2, 1, [2]), (1, 9, [1])],
)
def test_profiled_steps(tmp_path, num_steps, asked, profiled):
    run(tmp_path / "run", num_steps=num_steps, profile_steps=asked)
    folder = tmp_path / "run" / "profile"
    events = read_events(find_trace(folder))
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    assert steps == list(map(str, profiled))
    assert read_trace(folder).spans


def test_a_run_that_stops_while_it_is_profiled_leaves_the_profile(tmp_path, after_step):
    after_step(lambda step: step == 4 and signal.raise_signal(signal.SIGTERM))
    result, _ = run(tmp_path / "run", profile_steps=5)
    assert (result.step, result.stopped_by) == (4, "SIGTERM")
    assert read_trace(tmp_path / "run" / "profile").spans


def test_a_number_of_profiled_steps_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="profile_steps=-1 must be >= 0"):
        run(tmp_path / "run", profile_steps=-1)


def test_a_sample_ends_a_run_that_is_done(tmp_path, monkeypatch):
    class Sampling(cheap.CheapPrograms):
        def __init__(self, config):
            super().__init__(config)
            self.sample = lambda state, prompt: prompt[-3:] + np.int32(100)

    monkeypatch.setattr(loop, "make_programs", Sampling)
    result, _ = run(tmp_path, num_steps=1)
    prompt, new = result.sample
    assert prompt == bytes(range(len(prompt))).decode() and len(prompt) > 4
    # Continuation bytes that continue nothing.
    assert (tmp_path / "sample.txt").read_text() == prompt + new and len(new) == 3


def test_a_run_of_tokens_keeps_their_tokenizer(tmp_path, monkeypatch):
    tokenizer = small_tokenizer(tmp_path / "tokens", ["<end>", "a", "bc", "é?"])

    class Sampling(cheap.CheapPrograms):
        def __init__(self, config):
            super().__init__(config)
            self.sample = lambda state, prompt: np.array([3, 1, 200])

    monkeypatch.setattr(loop, "make_programs", Sampling)
    data = np.tile(np.array([1, 2, 3, 0], np.uint16), 800)
    text = Text(data, data[:400], "tokens", tokenizer)
    result, _ = run(tmp_path / "run", text=text, num_steps=4, eval_every=4)
    # A target is one, two, three or no bytes, all equally often.
    bits = result.held_out_loss / math.log(2) / 1.5
    assert result.held_out_bits_per_byte == pytest.approx(bits, rel=0.02)
    assert result.metrics[-1]["held_out_bits_per_byte"] == result.held_out_bits_per_byte
    assert result.sample == ("abcé?abcé?", "é?a")
    kept = tmp_path / "run" / TOKENIZER
    assert PublishedTokenizer(kept).digest == tokenizer.digest
    assert "bits per byte" in (tmp_path / "run" / "report.html").read_text()
    # Another run takes its place, of bytes.
    again, _ = run(tmp_path / "run", num_steps=2, eval_every=2)
    bits = again.held_out_loss / math.log(2)
    assert again.held_out_bits_per_byte == pytest.approx(bits) and not kept.exists()
    assert (tmp_path / "run" / "previous-1" / TOKENIZER / "tokenizer.json").is_file()
    # Tokens whose text is not known.
    numbers = Text(data, data[:400], "numbers", NumberTokenizer())
    result, _ = run(tmp_path / "numbers", text=numbers, num_steps=2, eval_every=2)
    assert result.held_out_loss and result.held_out_bits_per_byte is None


def test_a_vocabulary_that_is_too_large_is_refused(tmp_path):
    names = [f"<{i}>" for i in range(cheap.NUM_TOKENS + 1)]
    text = Text(TEXT.train, TEXT.held_out, "", small_tokenizer(tmp_path / "t", names))
    with pytest.raises(ValueError, match="has 257 tokens, but the model's vocab_size"):
        run(tmp_path / "run", text=text)
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_published_weights_but_resumes_with_its_own(
    tmp_path, monkeypatch
):
    calls = []

    class Published(cheap.CheapPrograms):
        def __init__(self, config):
            super().__init__(config)
            self.published = lambda state: (
                calls.append(1) or state._replace(table=jnp.zeros_like(state.table))
            )

    monkeypatch.setattr(loop, "make_programs", Published)
    result, _ = run(tmp_path, num_steps=1)
    # Of zeros, a float32 mean; the program's own table is off by 1e-3.
    assert result.metrics[0]["loss"] == pytest.approx(np.log(256), rel=1e-5)
    run(tmp_path, num_steps=2, resume=True)
    assert calls == [1]


def test_the_loss_curve_needs_no_held_out_loss_and_no_step(tmp_path):
    draw_loss([], tmp_path / "empty.png")
    draw_loss([{"step": 1, "loss": 2.0}], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
