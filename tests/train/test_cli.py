"""The main job from the command line, as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualpipe_jax import cli

ROOT = Path(__file__).parent.parent.parent
TINY = "tests/train/tiny.py"


def start(*args):
    """Starts `python -m dualpipe_jax train` as a user does: with no XLA flag set."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    return subprocess.Popen(
        [sys.executable, "-m", "dualpipe_jax", "train", *map(str, args)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_and_resumed_is_one_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = start(TINY, "--out", whole)
    printed, _ = done.communicate(timeout=300)
    assert done.returncode == 0
    assert printed.startswith("8 of 8 steps (")
    for word in ("loss ", "held-out loss ", "tokens/s ", "bubble ", str(whole)):
        assert word in printed

    # As many steps as it likes, until the signal.
    stopped = start(TINY, "--out", parts, "--steps", 1_000_000)
    deadline = time.monotonic() + 300
    while not (parts / "metrics.jsonl").exists() or not losses(parts):
        assert stopped.poll() is None, stopped.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    printed, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 0
    assert "stopped by SIGTERM after" in printed and "--resume continues" in printed
    before = losses(parts)

    resumed = start(
        TINY, "--out", parts, "--steps", len(before) + 2, "--resume", "--data", ROOT
    )
    printed, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert losses(parts)[: len(before)] == before
    assert len(losses(parts)) == len(before) + 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no-such"], "config 'no-such' not found"),
        ([TINY, "--data", "no-such"], "data path no-such is no file or folder"),
        ([TINY, "--data", os.devnull], "null is no file or folder"),
        ([TINY, "--steps", "0"], "num_steps=0 must be at least 1"),
        ([TINY, "--resume"], "no checkpoint in"),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    assert cli.main(["train", *args, "--out", str(out)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not out.exists()


def test_what_is_not_installed_is_named():
    # None in sys.modules is how Python marks a module that must not be found.
    code = (
        "import sys; sys.modules['rich.console'] = None\n"
        "from dualpipe_jax.cli import main; sys.exit(main(['train', 'bytes']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "needs rich.console; pip install 'dualpipe-jax[train]'" in done.stderr
