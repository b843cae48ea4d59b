"""Failing runs: what they keep, what they print, and how they end."""

import contextlib
import json
import resource
import shutil

import numpy as np
import pytest

from dualpipe_jax.train import loop
from dualpipe_jax.train.metrics import MetricsLog, read_metrics
from tests.train import cheap
from tests.train.cheap_runs import run, without_clock

pytestmark = pytest.mark.usefixtures("collect_garbage", "cheap_programs")


def spoil(monkeypatch, steps, **values):
    """In some steps replaces metrics, and adds `table` to the table."""

    class Spoilt(cheap.CheapPrograms):
        def train_step(self, state, inputs, targets):
            state, metrics = super().train_step(state, inputs, targets)
            if int(state.step) not in steps:
                return state, metrics
            found = dict(values)
            table = state.table + np.float32(found.pop("table", 0))
            return state._replace(table=table), metrics | found

    monkeypatch.setattr(loop, "make_programs", Spoilt)


def strictly(text):
    """What JSON's grammar makes of it: it knows no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": NAN, "grad_norm": NAN}, r"loss=nan, grad_norm=nan at step=6; lower"),
        ({"grad_norm": float("inf"), "table": NAN}, r"^grad_norm=inf at step=6; lower"),
        ({"grad_norm": NAN, "grads_finite": [False]}, r"\(the gradient of table\); lo"),
        # An update that overflows; the next loss would tell, after it is saved.
        ({"table": NAN}, r"^the state after step=6 is not finite \(table\) and is not"),
    ],
)
def test_nothing_that_is_not_finite_is_saved(values, message, tmp_path, monkeypatch):
    spoil(monkeypatch, [6], **values)
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path)
    # Of which the sixth would have been one.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    lines = [
        strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in lines] == [1, 2, 3, 4, 5, 6]
    for name in values.keys() & {"loss", "grad_norm"}:
        assert lines[-1][name] is None and lines[-2][name] > 0
    assert strictly((tmp_path / "run.json").read_text())["state"].startswith("ended by")
    # As without it, once the cause is gone.
    monkeypatch.setattr(loop, "make_programs", cheap.CheapPrograms)
    result, _ = run(tmp_path, resume=True)
    assert [record["step"] for record in result.metrics] == list(range(1, 9))


def test_steps_that_are_not_finite_may_be_skipped(tmp_path, monkeypatch):
    spoil(monkeypatch, [2, 3, 5, 8], loss=NAN, skipped=1)
    result, printed = run(tmp_path, max_skipped_steps=2)
    losses = [record["loss"] for record in result.metrics]
    assert [i for i, loss in enumerate(losses, 1) if loss is None] == [2, 3, 5, 8]
    assert "step 8/8" in printed and result.held_out_loss > 0
    page = (tmp_path / "report.html").read_text()
    assert "skipped steps</td><td>4, not finite" in page
    spoil(monkeypatch, [2, 3, 4, 8], loss=NAN)
    with pytest.raises(FloatingPointError, match=r"step=4; .* skipped before it: 2; "):
        run(tmp_path, max_skipped_steps=2)


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(finished, tmp_path):
    run(tmp_path)
    info = tmp_path / "checkpoints" / "8" / "info" / "metadata"
    info.write_text(info.read_text().replace("position", "positron"))
    result, printed = run(tmp_path, resume=True)
    assert "the checkpoint of step 8 is damaged (" in printed
    assert "that of step 6 is used" in printed
    assert without_clock(result.metrics) == without_clock(finished[1].metrics)
    _, printed = run(tmp_path, resume=True, num_steps=9)
    assert "damaged" not in printed


@pytest.fixture
def fill_the_disk(after_step):
    """No file grows beyond `size` bytes, from the end of one step to that of another.

    A write then fails, as on a disk that is full. (Python ignores SIGXFSZ.)
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def patch(size, first, last=None):
        limits = {first: size, last: soft}

        def set_limit(step):
            if step in limits:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limits[step], hard))

        after_step(set_limit)

    yield patch
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Of orbax's threads and tasks, only one gets to raise; the others' errors are left.
leaves_errors = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)


@leaves_errors
def test_a_disk_that_is_full_ends_no_run(finished, tmp_path, fill_the_disk):
    fill_the_disk(0, first=3, last=5)  # what step 3 saves, and two steps record
    result, printed = run(tmp_path)
    assert "the checkpoint of step 3 could not be written (OSError: " in printed
    # Once each, and nothing of the record is lost.
    assert result.save_failure is None and result.num_unwritten == 0
    assert printed.count("metrics.jsonl could not be written (") == 1
    assert printed.count("could not") == 2
    assert without_clock(result.metrics) == without_clock(finished[1].metrics)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]


@leaves_errors
def test_records_that_cannot_be_written_are_counted_and_shown(
    finished, tmp_path, fill_the_disk, after_step
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # It is full in the middle of a line.
    line = len((finished[0] / "metrics.jsonl").read_bytes().splitlines()[0])
    fill_the_disk(4 * line, first=5)
    result, printed = run(tmp_path, num_steps=5, checkpoint_every=9)
    assert result.num_unwritten >= 1 and result.save_failure
    # The result is of all steps.
    assert without_clock(result.metrics)[:4] == without_clock(finished[1].metrics)[:4]
    assert [record["step"] for record in result.metrics] == [1, 2, 3, 4, 5]
    assert printed.count("metrics.jsonl could not be written (") == 1
    written = len(read_metrics(tmp_path / "metrics.jsonl"))
    assert written == 5 - result.num_unwritten
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # A checkpoint that was written then has no records before it.
    after_step(lambda step: None)
    shutil.copytree(
        finished[0] / "checkpoints", tmp_path / "checkpoints", dirs_exist_ok=True
    )
    _, printed = run(tmp_path, resume=True)
    assert f"metrics.jsonl has no record of step {written + 1} to 8" in printed


@leaves_errors
def test_a_last_checkpoint_that_fails_is_told(tmp_path, fill_the_disk, after_step):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill_the_disk(5_000, first=8)
    result, printed = run(tmp_path)
    assert result.step == 8 and result.save_failure
    assert "the checkpoint of step 8 could not be written" in printed
    assert "not everything could be written: " in printed  # pictures are larger
    assert "the report could not be written: OSError: " in printed
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after_step(lambda step: None)
    assert run(tmp_path, resume=True)[0].save_failure is None


def test_a_profiler_that_fails_ends_no_run(tmp_path, monkeypatch):
    def full(folder, *compiled):
        raise OSError("No space left on device")

    monkeypatch.setattr("dualpipe_jax.train.profiler.profile", full)
    result, printed = run(tmp_path / "run", profile_steps=2)
    assert (result.step, result.save_failure) == (8, None)
    assert "no profile is taken: No space left on device" in printed


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def full(folder, *compiled):
        yield
        raise OSError("No space left on device")

    monkeypatch.setattr("dualpipe_jax.train.profiler.profile", full)
    result, printed = run(tmp_path / "run", profile_steps=2)
    assert (result.step, result.save_failure) == (8, None)
    assert "the profile was not written: No space left on device" in printed


def test_metrics_that_were_cut_off_are_read_as_far_as_they_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0})
            assert len(read_metrics(path)) == step  # flushed
    path.write_text(path.read_text() + '{"step": 4, "lo')
    with MetricsLog(path, keep_until=3) as log:
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
        log.write({"step": 4})
    with MetricsLog(path, keep_until=2):
        pass
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert list(tmp_path.iterdir()) == [path]
