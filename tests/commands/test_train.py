"""The main job from the command line, as processes of their own."""

import argparse
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from dualpipe_jax.commands import main as cli, train as train_cli
from dualpipe_jax.train import Result
from dualpipe_jax.train.metrics import read_metrics
from tests.train import tiny

ROOT = Path(__file__).parent.parent.parent
TINY = "tests/train/tiny.py"
CHEAP = "tests/train/cheap.py"


def start(*args, module="dualpipe_jax", **env):
    """Starts `python -m dualpipe_jax train` as a user does: with no XLA flag set."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    return subprocess.Popen(
        [sys.executable, "-m", module, "train", *map(str, args)],
        cwd=ROOT,
        env=kept | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_cheap(*args, **env):
    return start(CHEAP, *args, module="tests.train.cheap", **env)


def finish(process):
    """What a process prints, to stdout and stderr, that is to end well."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed, errors


def losses(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def wait_for(process, is_reached):
    """Until a run has come so far."""
    deadline = time.monotonic() + 300
    while not is_reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_a_step(process, folder, more_than=0):
    metrics = folder / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and len(losses(folder)) > more_than)


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_and_resumed_is_one_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    printed, _ = finish(start(TINY, "--out", whole))
    assert printed.startswith("8 of 8 steps (")
    for word in ("loss ", "held-out loss ", "tokens/s ", "bubble ", str(whole)):
        assert word in printed

    # As many steps as it likes, until the signal.
    stopped = start(TINY, "--out", parts, "--steps", 1_000_000)
    wait_for_a_step(stopped, parts)
    stopped.send_signal(signal.SIGTERM)
    printed, _ = finish(stopped)
    assert "stopped by SIGTERM after" in printed and "--resume continues" in printed
    before = losses(parts)

    steps = ["--steps", len(before) + 2]
    finish(start(TINY, "--out", parts, *steps, "--resume", "--data", ROOT))
    assert losses(parts)[: len(before)] == before
    assert len(losses(parts)) == len(before) + 2


def documented(*args):
    """The line with which the documents start a run under Slurm, here without it."""
    text = (ROOT / "docs" / "training.md").read_text()
    (line,) = re.findall(r"^srun .* dualpipe_jax train .*", text, re.M)
    script = line.replace("config.py", CHEAP).replace("--distributed", shlex.join(args))
    return f"""srun() {{ shift; "$@"; }}; python() {{
        shift 2; exec {sys.executable} -m tests.train.cheap "$@"; }}; {script}"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_resumed_is_one_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start_cheap("--out", whole, "--steps", 80))
    script = documented("--steps", "80")
    env = os.environ | {"OUT": str(parts), "CHEAP_STEP_SECONDS": "0.05"}
    del env["XLA_FLAGS"]
    rng = np.random.default_rng(0)

    def start_documented():
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # In the first checkpoint, so that there is nothing yet to continue from.
    run = start_documented()
    wait_for(run, lambda: any(parts.glob("checkpoints/*tmp*")))
    run.kill()
    assert "the run begins" in run.communicate()[1]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        before = len(losses(parts))
        run = start_documented()
        # A save begins every third step; so the kill comes in the midst of one, or not.
        wait_for_a_step(run, parts, more_than=before)
        time.sleep(rng.uniform(0, 0.6))
        run.send_signal(number)
        run.communicate()
        assert run.returncode == (0 if number == signal.SIGTERM else -number)
        assert 0 < len(losses(parts)) < 80
    _, errors = finish(start_documented())
    assert "the run continues after step=" in errors
    records = [read_metrics(folder / "metrics.jsonl") for folder in (whole, parts)]
    for record in (*records[0], *records[1]):
        del record["tokens_per_s"]  # the one field that a clock has a part in
    assert len(records[0]) == 80 and records[0] == records[1]
    assert sorted(p.name for p in (parts / "checkpoints").iterdir()) == ["78", "80"]


@pytest.mark.slow
def test_a_second_run_compiles_nothing_and_is_the_same(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cache = tmp_path / "dualpipe_jax"
    env = {
        "XDG_CACHE_HOME": str(tmp_path),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # its fonts are among the caches
    }
    options = ["--steps", 60]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, errors = finish(start(TINY, "--out", whole, *options, **env))
    assert re.search(r"compiling train step \([\d,]+ operations\), ev", errors)
    assert "cannot be" not in errors
    kept = {path.name for path in cache.glob("*-cache")}
    # The step with donated buffers and collectives among them.
    assert any(name.startswith("jit_train_step-") for name in kept)

    # The second run compiles nothing, also where it goes on after a signal that no
    # process can catch.
    process = start(TINY, "--out", killed, *options, **env)
    folders = functools.partial(killed.glob, "checkpoints/*")
    wait_for(process, lambda: any(path.name.isdecimal() for path in folders()))
    process.kill()
    errors = process.communicate()[1]
    assert "compiling train step" in errors and "cannot be" not in errors
    assert {path.name for path in cache.glob("*-cache")} == kept
    _, errors = finish(start(TINY, "--out", killed, *options, "--resume", **env))
    assert "cannot be" not in errors
    assert {path.name for path in cache.glob("*-cache")} == kept
    assert losses(killed) == losses(whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_without_noise(tmp_path):
    finish(start_cheap("--out", tmp_path / "run"))
    last = tmp_path / "run" / "checkpoints" / "8"
    largest = max(last.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    printed, errors = finish(start_cheap("--out", tmp_path / "run", "--resume"))
    assert printed.startswith("8 of 8 steps (")
    assert "the checkpoint of step 8 is damaged (" in errors
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors


def test_the_summary_tells_what_was_not_saved_and_shows_the_sample(tmp_path):
    result = Result(
        step=8,
        metrics=[{"loss": 2.5, "tokens_per_s": 9.0, "pipeline_bubble_ratio": 0.1}],
        stopped_by=None,
        compile_s=1.0,
        train_s=2.0,
        save_failure="OSError: No space left on device",
        sample=("def f(", "x):\n"),
        num_unwritten=3,
    )
    lines = train_cli.summary(tiny.config(), result, tmp_path, "token").splitlines()
    assert "loss           2.500 nats per token (first step 2.500)" in lines
    assert lines[-5:-3] == [
        "NOT SAVED      the last checkpoint could not be written: "
        "OSError: No space left on device",
        "NOT SAVED      the last 3 records could not be written to metrics.jsonl",
    ]
    assert lines[-1] == "def f(|x):"


def test_the_summary_is_of_what_is_finite(tmp_path):
    record = {"tokens_per_s": 9.0, "skipped": 0.0}
    for metrics, line in [
        (
            [{"loss": 3.0}, {"loss": 2.0}, {"loss": None, "skipped": 1.0}],
            "loss   .* 2.0",
        ),
        (
            [{"loss": None, "skipped": 1.0}],
            "skipped        1 steps that were not finite",
        ),
    ]:
        metrics = [record | each for each in metrics]
        result = Result(3, metrics, stopped_by=None, compile_s=1.0, train_s=2.0)
        printed = train_cli.summary(tiny.config(), result, tmp_path)
        assert re.search(line, printed) and "None" not in printed


def test_the_flags_in_the_documents_exist():
    parser = argparse.ArgumentParser()
    train_cli.add_arguments(parser)
    text = (ROOT / "docs" / "training.md").read_text()
    # Those of other commands are tested where they run: tests/docs.
    text = re.sub(r"dualpipe_jax (?!train)\w+[^`\n]*", "", text)
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    launchers = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--requeue"}
    launchers |= {"--signal", "--kill-on-bad-exit"}
    others = argparse.ArgumentParser(), argparse.ArgumentParser()
    for other, name in zip(others, ("launch", "export"), strict=True):
        cli.add_arguments(other, name)
    actions = [action for each in (parser, *others) for action in each._actions]
    flags = {flag for action in actions for flag in action.option_strings}
    assert found - launchers <= flags, found - launchers - flags
    # Each launch line by itself, whatever the shell would put in place of a variable.
    lines = re.findall(r"dualpipe_jax train (.*?)(?:\s[#&].*)?$", text, re.M)
    for line in lines:
        assert parser.parse_args(line.split()).config in (
            "configs/tiny.py",
            "config.py",
        )
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no-such"], "config 'no-such' not found"),
        ([TINY, "--data", "no-such"], "data path no-such is not a file or folder"),
        ([TINY, "--data", os.devnull], "null is not a file or folder"),
        ([TINY, "--steps", "0"], "num_steps=0 must be at least 1"),
        ([TINY, "--resume=must"], "no checkpoint in"),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    assert cli.main(["train", *args, "--out", str(out)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "module"),
    # flax installs rich and orbax; matplotlib is first needed when all is prepared.
    [("train", "rich.console"), ("train", "matplotlib"), ("report", "matplotlib")],
)
def test_what_is_not_installed_is_named(command, module, tmp_path):
    # None in sys.modules is how Python marks a module that must not be found.
    code = (
        f"import sys; sys.modules['{module}'] = None\n"
        "from dualpipe_jax.commands.main import main; "
        f"sys.exit(main(['{command}', 'tiny']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    package = module.partition(".")[0]
    hint = f"needs {package}; pip install 'dualpipe-jax[train]'"
    assert hint in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
