"""Who is lost, in threads that are connected as processes are."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError

from dualpipe_jax.processes import LOST, Watch, watch as watch_module


class Run:
    """Watches that are connected as those of three processes, and how they ended."""

    def __init__(self, heartbeat=60.0, **kwargs):
        self.ended = {i: threading.Event() for i in range(3)}
        self.statuses = {}
        self.pairs = {i: socket.socketpair() for i in (1, 2)}
        connections = [{i: pair[0] for i, pair in self.pairs.items()}]
        connections += [{0: self.pairs[i][1]} for i in (1, 2)]
        self.watches = [
            Watch(each, i, heartbeat=heartbeat, end=self.end(i), **kwargs)
            for i, each in enumerate(connections)
        ]

    def end(self, number):
        def end(status):
            self.statuses[number] = status
            self.ended[number].set()
            self.watches[number].leave()

        return end

    def wait(self, *numbers):
        for number in numbers:
            assert self.ended[number].wait(30)
        return [self.statuses[number] for number in numbers]

    def close(self):
        for each in self.watches:
            each.leave()
        for pair in self.pairs.values():
            for end in pair:
                end.close()


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(watch_module, "GRACE_S", 0.2)
    runs = []

    def make(**kwargs):
        runs.append(Run(**kwargs))
        return runs[-1]

    yield make
    for each in runs:
        each.close()


def lines(capsys):
    return sorted(set(capsys.readouterr().err.splitlines()))


def test_a_process_that_is_killed_is_named_by_all_others(run, capsys):
    three, reports = run(), []
    for each in three.watches:
        each.note("step 7")
    with three.watches[0].reporting(reports.append):
        # As the kernel does for a process that is killed.
        three.pairs[2][1].shutdown(socket.SHUT_RDWR)
        assert three.wait(0, 1) == [LOST, LOST]
    line = (
        "process 2 was lost after step 7 (its connection closed); start all processes "
        "again with --resume to continue"
    )
    assert f"error: {line}." in lines(capsys)
    assert reports == [line]


def test_without_process_0_the_others_end(run, capsys):
    three = run()
    for pair in three.pairs.values():
        pair[0].shutdown(socket.SHUT_RDWR)
    assert three.wait(1, 2) == [LOST, LOST]
    assert any("process 0 was lost (its" in line for line in lines(capsys))


def test_one_that_says_nothing_is_lost(run, capsys):
    three = run(heartbeat=0.4)
    # Process 1 neither speaks nor closes: it is stopped.
    three.watches[1]._has_left = True
    assert three.wait(0, 2) == [LOST, LOST]
    (line,) = lines(capsys)
    assert line.startswith("error: process 1 was lost (no sign of life for 0.4 s); sta")


def test_the_error_of_one_ends_the_others(run, capsys):
    three = run()
    with pytest.raises(OSError), three.watches[1]:
        raise OSError("the disk\nis gone")
    assert three.wait(0, 2) == [LOST, LOST]
    (line,) = lines(capsys)
    assert line.startswith("error: process 1 failed: OSError: the disk is gone; start")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), 1),
        (JaxRuntimeError("UNKNOWN: Gloo AllGather failed"), LOST),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: of memory"), 1),
    ],
)
def test_an_error_of_all_is_left_to_each(error, status, run, capsys):
    three = run()
    for each in three.watches:
        each.fail(error)
    three.pairs[1][0].shutdown(socket.SHUT_RDWR)  # process 0 is through
    assert three.wait(1) == [status]
    assert lines(capsys) == []


def test_leaving_is_not_being_lost(run, capsys):
    three = run(heartbeat=0.3)
    three.watches[1].leave()
    three.pairs[1][1].shutdown(socket.SHUT_RDWR)
    assert not three.ended[0].wait(1)
    assert lines(capsys) == []


def test_a_process_ends_with_its_launcher():
    code = (
        "import os, sys, time; from dualpipe_jax.processes import Watch;"
        "watch = Watch({}, launcher=os.getppid()); print('on', flush=True);"
        "time.sleep(60)"
    )
    middle = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', "
        f"{code!r}], stdout=subprocess.PIPE); print(child.stdout.readline(), child.pid)"
    )
    # The launcher in the middle ends at once.
    done = subprocess.run(
        [sys.executable, "-c", middle],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    # Its own standard error, which the child has too, is at its end.
    assert "error: the launcher was lost; start all processes" in done.stderr


def test_processes_that_make_no_progress_end_with_their_stacks(run, capsys):
    three = run(heartbeat=0.4, step_timeout=0.0)
    three.watches[0].note("step 7")
    three.watches[1].note("step 6")
    three.watches[2].note("step 7")
    told = three.watches[0]._peers[0]
    while told.progress != "step 6":  # by its next sign of life
        time.sleep(0.01)
    assert not three.ended[0].is_set()
    three.watches[0]._step_timeout = 0.3
    assert three.wait(0, 1, 2) == [LOST, LOST, LOST]
    error = capsys.readouterr().err
    assert (
        "error: no progress for 0.3 s after step 7; process 1 is after step 6; start "
        "all processes again"
    ) in error
    assert "error: process 0 made no progress for 0.3 s; start all" in error
    for number in range(3):
        assert f"process {number}, thread MainThread:" in error
    assert "in test_processes_that_make_no_progress_end_with_their_stacks" in error


def test_progress_is_expected_from_the_first_step_to_the_last(run):
    three = run(heartbeat=0.2, step_timeout=0.5)
    three.watches[0].note("step 1")
    three.watches[0].rest()
    assert not three.ended[0].wait(1)  # nor from the others, which compile
