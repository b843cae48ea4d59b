"""The command `launch`: what it makes of its arguments, and of the run's."""

import json
import sys

import pytest

from dualpipe_jax.commands import main as cli
from dualpipe_jax.processes import Launch, Layout
from tests.train import tiny

TRAIN = ["--", "train", tiny.__file__]


def test_what_is_launched(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Launch, "run", lambda self: made.append(self) or 75)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--processes", "2", "--fallback", "pp=2", "--restarts", "5"]
    rest = ["--mesh", "pp=2,dp=2", "--out", str(tmp_path)]
    assert cli.main(["launch", *options, *TRAIN, *rest]) == 75
    (launch,) = made
    expected = [sys.executable, "-m", "dualpipe_jax", *TRAIN[1:], *rest]
    assert launch.command == expected
    assert launch.layouts == [Layout("", 4), Layout("pp=2", 2)]
    assert (launch.num_processes, launch.restarts) == (2, 5)
    assert launch.saved() is None
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "checkpoints" / "80.orbax-checkpoint-tmp").mkdir()
    assert launch.saved() == 40
    launch.remember("process 1 was lost")
    record = json.loads((tmp_path / "launches.jsonl").read_text())
    assert record["event"] == "process 1 was lost"
    # A config for CPUs takes no GPU.
    assert launch.gpus() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 2", "the command '' must be `train CONFIG ...`; give it after"),
        ("--processes 2 -- serve tiny", "the command 'serve tiny' must be `train"),
        ("--processes 0 {}", "processes=0 must be at least 1"),
        ("--processes 2 --restarts -1 {}", "restarts=-1 must be at least 0"),
        ("--processes 3 {}", "3 processes do not share the mesh's 2 devices evenly"),
        ("--processes 2 --fallback pp {}", "--mesh 'pp': 'pp' must be AXIS=SIZE"),
        ("--processes 1 --fallback pp=3 {}", "num_ranks=3 must be"),
        ("--processes 1 {} --coordinator a:1", "--coordinator is launch's to give"),
        ("--processes 1 {} --process-id 1", "--process-id is launch's to give"),
        ("--processes 1 --nodes 2 {}", "nodes=2 need --coordinator HOST:PORT"),
        ("--processes 1 --nodes 2 --slurm {}", "need --coordinator"),
        ("--processes 1 --coordinator a:1 --slurm {}", "--slurm takes all from Slurm"),
        ("--processes 1 -- train nowhere.py", "nowhere.py"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
    def run(self):
        raise AssertionError("started")

    monkeypatch.setattr(Launch, "run", run)
    words = arguments.replace("{}", " ".join(TRAIN)).split()
    assert cli.main(["launch", *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
