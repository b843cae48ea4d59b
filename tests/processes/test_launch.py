"""Processes that are started again, or not; of one line of Python each."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualpipe_jax.processes import LOST, Launch, Layout, Machines
from dualpipe_jax.processes.launch import local_gpus

# Says how it was started, and does what is planned for this start of this process.
PROGRAM = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
options = sys.argv[2:]
number = "0"
if "--process-id" in options:
    number = options[options.index("--process-id") + 1]
start = len(list(folder.glob(f"start-{number}-*")))
(folder / f"start-{number}-{start}").write_text(
    " ".join(options) + " " + os.environ.get("JAX_LOCAL_DEVICE_IDS", "-"))
plan = json.loads((folder / "plan").read_text())
if number == "0":
    (folder / "checkpoint").write_text(plan["saved"][start])
exec(plan["todo"][start][number])
"""
KILLED, FINE = "os.kill(os.getpid(), 9)", "print('fine')"


@pytest.fixture
def launch(tmp_path):
    """Runs a launch of two processes; `todo` has a line for each start."""

    def run(todo, saved=(), **kwargs):
        steps = [str(step) for step in saved] or [""] * len(todo)
        plan = json.dumps({"todo": todo, "saved": steps})
        (tmp_path / "plan").write_text(plan)
        said, remembered = [], []

        def newest():
            path = tmp_path / "checkpoint"
            text = path.read_text() if path.exists() else ""
            return int(text) if text else None

        options = {
            "command": [sys.executable, "-c", PROGRAM, str(tmp_path)],
            "num_processes": 2,
            "layouts": [Layout("", 4)],
            "restarts": 1,
            "saved": newest,
            "say": said.append,
            "remember": remembered.append,
            "grace": 0.5,
        }
        status = Launch(**options | kwargs).run()
        starts = [p.read_text() for p in sorted(tmp_path.glob("start-0-*"))]
        return status, starts, remembered, said

    return run


def both(first, second):
    return {"0": first, "1": second}


WAIT = "time.sleep(.2); sys.exit(75)"  # what those that notice do


def test_all_end_well(launch):
    status, starts, remembered, said = launch([both(FINE, FINE)])
    assert (status, remembered, said) == (0, [], [])
    (start,) = starts
    assert "--coordinator 127.0.0.1:" in start and "--num-processes 2" in start
    assert "--resume" not in start and "--mesh" not in start


def test_a_lost_process_starts_all_again(launch):
    status, starts, remembered, said = launch(
        [both(WAIT, KILLED), both(FINE, FINE)], saved=[12, 24]
    )
    assert status == 0
    assert [start.startswith("--resume") for start in starts] == [False, True]
    assert remembered == [
        "process 1 was ended by SIGKILL; started again from the checkpoint of step 12"
    ]
    assert said == remembered


def test_without_new_checkpoints_a_smaller_mesh_is_tried_and_then_none(launch):
    status, starts, remembered, _ = launch(
        [both(WAIT, KILLED)] * 4, layouts=[Layout("", 4), Layout("pp=3", 3)]
    )
    assert status == LOST
    # Three devices are not shared by two processes.
    meshes = [start.partition("--mesh ")[2].partition(" ")[0] for start in starts]
    assert meshes == ["", "", "pp=3", "pp=3"]
    assert "--num-processes" not in starts[2]
    assert "started again from the beginning" in remembered[0]
    assert "started again on pp=3 from the beginning" in remembered[1]


def test_new_checkpoints_restore_the_restarts(launch):
    status, starts, *_ = launch(
        [*[both(WAIT, KILLED)] * 4, both(FINE, FINE)], saved=[1, 2, 3, 4, 5]
    )
    assert (status, len(starts)) == (0, 5)


@pytest.mark.parametrize("status", [1, 2])
def test_what_would_come_again_ends_the_run(launch, status):
    todo = both(WAIT, f"print('what it was'); sys.exit({status})")
    found, starts, remembered, said = launch([todo, both(FINE, FINE)])
    assert (found, len(starts), remembered) == (status, 1, [])
    assert said == ["[1] what it was"]


def test_a_process_that_is_stopped_is_killed(launch):
    started = time.monotonic()
    stopped = "os.kill(os.getpid(), signal.SIGSTOP)"
    todo = [both(WAIT, stopped), both(FINE, FINE)]
    status, starts, *_ = launch(todo)
    assert (status, len(starts)) == (0, 2)
    assert time.monotonic() - started < 60


def test_gpus_are_divided_and_may_go(launch, tmp_path):
    def gpus():
        return [0, 2] if list(tmp_path.glob("start-*")) else [0, 1, 2, 3]

    status, starts, *_ = launch(
        [both(WAIT, KILLED), both(FINE, FINE)],
        layouts=[Layout("", 4), Layout("ep=3", 3), Layout("pp=2", 2)],
        restarts=9,
        gpus=gpus,
    )
    assert status == 0
    assert starts[0].endswith(" 0,1")
    assert "--mesh pp=2" in starts[1] and starts[1].endswith(" 0")


def test_several_machines_number_their_processes_and_leave_restarts_alone(launch):
    status, starts, remembered, _ = launch(
        [{"2": "sys.exit(75)", "3": KILLED}],
        machines=Machines(2, 1, "node-0:1234"),
    )
    assert (status, starts, remembered) == (LOST, [], [])


def test_a_signal_is_sent_on(tmp_path):
    """To process 0, which stops all; the second one to all."""
    waits = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('on', flush=True)\n"
        "time.sleep(60)\n"
    )
    code = (
        "import sys; from dualpipe_jax.processes import Launch, Layout\n"
        f"launch = Launch([sys.executable, '-c', {waits!r}], 1, [Layout('', 1)], 3, "
        "lambda: None, print, print)\n"
        "sys.exit(launch.run())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 0}, "processes=0 must be at least 1"),
        ({"restarts": -1}, "restarts=-1 must be at least 0"),
        ({"num_processes": 3}, "3 processes do not share the mesh's 4 devices evenly"),
        (
            {"layouts": [Layout("", 4), Layout("pp=2", 2)]},
            "--fallback is for one machine",
        ),
    ],
)
def test_bad_input(changes, message):
    good = Launch([], 2, [Layout("", 4)], 0, lambda: None, print, print)
    if "layouts" in changes:
        changes = {**changes, "machines": Machines(2, 0, "a:1")}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **changes)


@pytest.mark.parametrize("machines", [(0, 0), (2, 2, "a:1"), (2, 0)])
def test_bad_machines(machines):
    with pytest.raises(ValueError, match=r"must be below|need --coordinator"):
        Machines(*machines)


def test_slurm_tells_which_machine_this_is(monkeypatch):
    for name in ("SLURM_NNODES", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"SLURM_NNODES.*start this with srun"):
        Machines.of_slurm()
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.setenv("SLURM_NODEID", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[003-006]")
    count, this, address = dataclasses.astuple(Machines.of_slurm())
    assert (count, this, address.partition(":")[0]) == (4, 2, "node003")


def test_no_mesh_that_fits(launch):
    with pytest.raises(ValueError, match="no mesh fits the 1 GPUs of this machine"):
        launch([], gpus=lambda: [0])


def test_gpus_are_counted_by_the_drivers_tool(tmp_path, monkeypatch):
    tool = Path(tmp_path / "nvidia-smi")
    tool.write_text("#!/bin/sh\necho 'GPU 0: A'\necho 'GPU 1: A'\necho 'GPU 2: A'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_gpus() == [0, 1, 2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert local_gpus() == [0, 1]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local_gpus() is None
