"""Several processes: how they meet, or say who is missing; that they are one run."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dualpipe_jax.commands import main as cli
from dualpipe_jax.processes import Launch, Layout, distributed, rendezvous
from dualpipe_jax.train import newest_checkpoint
from tests.train import tiny

ROOT = Path(__file__).parent.parent.parent
CHEAP = "tests/train/cheap.py"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(num_processes):
    """Of the processes of one run, each with its part of eight devices."""
    return {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // num_processes} "
        "--xla_backend_optimization_level=0",  # most of the time goes into compiling
        "PYTHONUNBUFFERED": "1",
    }


def start(
    *args,
    module="dualpipe_jax",
    num_processes=2,
    process_ids=None,
    address=None,
    **env,
):
    """Starts the processes of one run."""
    coordinator = address or f"127.0.0.1:{free_port()}"
    env = os.environ | environment(num_processes) | env
    command = [sys.executable, "-m", module, "train", *map(str, args)]
    several = ["--coordinator", coordinator, "--num-processes", str(num_processes)]
    return [
        subprocess.Popen(
            [*command, *several, "--process-id", str(process_id)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process_id in process_ids or range(num_processes)
    ]


def wait_for_all(processes, timeout):
    """What each printed, and their statuses. All end, or all are killed."""
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return printed, [process.returncode for process in processes]


def finish(processes, timeout=240):
    """Waits; returns what each printed. All end well."""
    printed, statuses = wait_for_all(processes, timeout)
    assert statuses == [0] * len(processes), "\n=====\n".join(printed)
    return printed


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clock = "tokens_per_s"
    return [{k: v for k, v in json.loads(x).items() if k != clock} for x in lines]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    path = tmp_path / "eight.py"
    path.write_text(
        "import dataclasses\n"
        "from tests.train import tiny\n"
        "def config():\n"
        "    return dataclasses.replace(\n"
        "        tiny.config(), mesh=tiny.config().mesh | {'pp': 2, 'dp': 4},\n"
        "        microbatch_size=4, num_steps=3)\n"
    )
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(64)) * 60)
    args = [path, "--data", text, "--out"]
    printed = finish(start(*args, tmp_path / "two"))
    assert "3 of 3 steps" in printed[0] and "loss" not in printed[1]
    finish(start(*args, tmp_path / "one", num_processes=1))
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert [r["step"] for r in two] == [1, 2, 3]
    assert two[-1]["loss"] < two[0]["loss"] - 0.1  # it learns, so steps matter
    for name in ("loss", "grad_norm", "held_out_loss"):
        series = [[r[name] for r in run if name in r] for run in (two, one)]
        # f32: gloo sums over processes in another order; Adam makes it grow.
        np.testing.assert_allclose(*series, rtol=1e-4, err_msg=name)


def wait_for_steps(count, folder, process=None):
    deadline = time.monotonic() + 100
    while not (folder / "metrics.jsonl").exists() or len(records(folder)) < count:
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_what_happens_to_one_process_happens_to_all(tmp_path):
    """A disk that is full, a signal; of cheap programs, which start in seconds."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run_args(folder):
        return [CHEAP, "--steps", "24", "--out", str(folder)]

    def run(folder, *args, **env):
        args = [*run_args(folder), *args]
        return start(*args, module="tests.train.cheap", **env)

    finish(run(whole))
    stopped = run(parts, CHEAP_STEP_SECONDS="0.2")
    # Process 1 cannot write what it has of the checkpoint of step 6, or 9.
    wait_for_steps(4, parts, stopped[0])
    limits = resource.prlimit(stopped[1].pid, resource.RLIMIT_FSIZE)
    resource.prlimit(stopped[1].pid, resource.RLIMIT_FSIZE, (300, limits[1]))
    wait_for_steps(8, parts, stopped[0])
    resource.prlimit(stopped[1].pid, resource.RLIMIT_FSIZE, limits)
    # And process 1 is told to stop; process 0 is the one that writes.
    wait_for_steps(13, parts, stopped[0])
    stopped[1].send_signal(signal.SIGTERM)
    printed = finish(stopped)
    assert "the checkpoint of step 6 could not be written (" in printed[0]
    assert "could not" not in printed[1]
    assert re.search(r"stopped by SIGTERM after \d+ of 24 steps", printed[0])
    steps = len(records(parts))
    assert 13 <= steps < 24
    saved = [int(path.name) for path in (parts / "checkpoints").iterdir()]
    assert max(saved) == steps
    # Started again, process 0 is killed, and all of them start once more.
    lines = launched(parts, run_args(parts), kill_after=16)
    assert records(parts) == records(whole)
    (line,) = lines
    assert re.fullmatch(
        r"process 0 was ended by SIGKILL; started again from the checkpoint of step "
        r"\d+",
        line,
    )


def launched(folder, args, *, kill_after):
    """What `Launch` remembers of a run whose process 0 is killed."""
    lines = []

    def kill():
        wait_for_steps(kill_after, folder)
        holder = json.loads((folder / ".lock").read_text())
        os.kill(holder["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    launch = Launch(
        [sys.executable, "-m", "tests.train.cheap", "train", *args, "--resume"],
        num_processes=2,
        layouts=[Layout("", 2)],
        restarts=1,
        saved=lambda: newest_checkpoint(folder),
        say=print,
        remember=lines.append,
        environment=environment(2) | {"CHEAP_STEP_SECONDS": "0.2"},
    )
    assert launch.run() == 0
    killer.join()
    return lines


def refused(processes, timeout=60):
    """The one line that all processes end with."""
    printed, statuses = wait_for_all(processes, timeout)
    assert statuses == [2, 2], printed
    (line,) = {
        line for text in printed for line in text.splitlines() if " error: " in line
    }
    return line


def test_processes_that_were_not_started_alike_touch_nothing(tmp_path):
    options = {"address": f"127.0.0.1:{free_port()}", "module": "tests.train.cheap"}
    args = [CHEAP, "--out", tmp_path / "run"]
    processes = [
        *start(*args, "--steps", 8, process_ids=[0], **options),
        *start(*args, "--steps", 9, "--resume", process_ids=[1], **options),
    ]
    line = refused(processes)
    assert "process 1 was started with num_steps=9, resume=true, but process" in line
    assert (
        "process 0 was started with num_steps=8, resume=false; start all with the same"
        in line
    )
    assert not (tmp_path / "run").exists()


def meet_and_leave(*args):
    for connection in rendezvous.meet(*args).values():
        connection.close()


def meet(address, num_processes, process_ids, timeout):
    """What `meet` says in each of several threads: None, or its error."""
    said = dict.fromkeys(range(len(process_ids)))

    def run(index, process_id):
        try:
            meet_and_leave(address, num_processes, process_id, timeout)
        except ValueError as error:
            said[index] = str(error)

    threads = [
        threading.Thread(target=run, args=each) for each in enumerate(process_ids)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)  # so that the order is the one given
    for thread in threads:
        thread.join()
    return list(said.values())


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 2, 0]])
def test_processes_meet_whoever_is_first(order, address):
    assert meet(address, 4, order, 20) == [None] * 4
    assert meet(address, 4, order, 20) == [None] * 4  # the port is free again


def test_a_process_that_does_not_come_is_named(address):
    first, second = meet(address, 4, [0, 2], 0.5)
    assert "2 of 4 processes did not connect within 0.5 s, the first of them" in first
    assert "process 1; start them all" in first
    assert second == "process 0 did not see all others in time"


def test_processes_that_disagree_are_named(address):
    said = meet(address, 3, [0, 1, 1], 5)
    assert all("two processes have --process-id 1; give" in line for line in said)
    port = address.rpartition(":")[2]

    def other():
        with contextlib.suppress(ValueError):
            rendezvous.meet(f"localhost:{port}", 4, 3, 5)

    thread = threading.Thread(target=other)
    thread.start()
    (said,) = meet(address, 3, [0], 5)
    thread.join()
    assert "process 3 was started as one of 4 processes, but process 0 as one" in said


def test_a_process_may_come_again_and_others_may_knock(address):
    host, port = rendezvous.parse_address(address)

    def knock():
        time.sleep(0.2)
        for line in (b"GET / HTTP/1.1\n", b"", b"\xff\n"):
            with socket.create_connection((host, port)) as client:
                client.sendall(line)
        with socket.create_connection((host, port)) as client:
            client.sendall(b"dualpipe_jax 1 3\n")
            time.sleep(0.2)
        # That was killed while it waited; the others come later.
        second = threading.Thread(target=meet_and_leave, args=(address, 3, 2, 5))
        second.start()
        time.sleep(0.2)
        meet_and_leave(address, 3, 1, 5)
        second.join()

    thread = threading.Thread(target=knock)
    thread.start()
    assert meet(address, 3, [0], 5) == [None]
    thread.join()


def test_a_coordinator_that_is_another_program_is_told(address):
    host, port = rendezvous.parse_address(address)
    with socket.create_server((host, port)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client:
                        client.sendall(b"HTTP/1.1 400 Bad Request\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        (said,) = meet(address, 2, [1], 0.5)
        assert "did not answer within 0.5 s (it is another program); start pro" in said
        (said,) = meet(address, 2, [0], 0.5)
        assert re.search(r"process 0 cannot listen at port \d+ \(.*choose a port", said)
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coordinator 127.0.0.1:1", "num_processes and process_id must be given too"),
        ("--num-processes 2", "coordinator and process_id must be given too"),
        (
            "--coordinator {} --num-processes 2 --process-id 2",
            "process_id=2 must be at",
        ),
        ("--coordinator {} --num-processes 2 --process-id -1", "process_id=-1 must be"),
        (
            "--coordinator {} --num-processes 0 --process-id 0",
            "num_processes=0 must be",
        ),
        (
            "--coordinator nohost --num-processes 2 --process-id 1",
            "'nohost' is not an addr",
        ),
        (
            "--coordinator a:b --num-processes 2 --process-id 1",
            "'a:b' is not an address",
        ),
        (
            "--coordinator h:0 --num-processes 2 --process-id 0",
            "'h:0' is not an address",
        ),
        (
            "--coordinator ::1:9 --num-processes 2 --process-id 0",
            "is not an address; give",
        ),
        (
            "--coordinator http://h:9 --num-processes 2 --process-id 0",
            "is not an address",
        ),
        (
            "--coordinator {} --num-processes 2 --process-id 1 --connect-timeout 0.5",
            "did not answer within 0.5 s (",
        ),
        (
            "--coordinator no-such-host.invalid:9 --num-processes 2 --process-id 1 "
            "--connect-timeout 0.5",
            "coordinator no-such-host.invalid:9 did not answer within 0.5 s (",
        ),
        (
            "--coordinator {} --num-processes 2 --process-id 0 --connect-timeout 0.5",
            "1 of 2 processes did not connect within 0.5 s, the first of them proc",
        ),
        (
            "--coordinator {} --num-processes 2 --process-id 0 --connect-timeout 0",
            "timeout=0.0 must be positive",
        ),
        ("--distributed", "no cluster's environment was found"),
        ("--distributed --process-id 1", "--distributed takes all from the cluster"),
    ],
)
def test_bad_flags_are_one_line(flags, message, address, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)  # these tests may run in a cluster
    (tmp_path / "text").write_bytes(b"text" * 1000)
    data = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / "run")]
    path = tiny.__file__
    assert cli.main(["train", path, *data, *flags.format(address).split()]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_slurm_tells_where_the_others_are(monkeypatch):
    variables = {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_NODELIST": "node[003-004]",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    met = {}
    monkeypatch.setattr(rendezvous, "meet", lambda *args: met.update(args=args) or {})
    initialize = lambda *args, **kwargs: met.update(jax=(args, kwargs))  # noqa: E731
    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    distributed.connect(timeout=7)
    port = met["args"][0].partition(":")[2]
    assert met["args"] == (f"node003:{port}", 8, 5, 7)
    args, kwargs = met["jax"]
    assert args == (f"node003:{port}", 8, 5) and kwargs["local_device_ids"] == [1]
