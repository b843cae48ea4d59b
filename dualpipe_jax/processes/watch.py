"""Notices that a process of a run is lost, says so, and ends this one.

jax notices too, after 100 s, and ends the process from C++ with a stack trace. A
collective that waits for the lost process never returns, so the process can only be
ended, and from another thread.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

# The exit status of a process that ends because another was lost: EX_TEMPFAIL of
# sysexits.h, "try again". Starting the run again with --resume continues it.
LOST = 75
HEARTBEAT_S = 20.0
# The longest that a step with its evaluation may take by default.
STEP_TIMEOUT_S = 1800.0
# Others may be about to fail by themselves, and say it better.
GRACE_S = 5.0
# What the report may take to be written.
REPORT_S = 3.0
_BEATS = 4  # within a heartbeat
_SETTLE_S = 1.0
_LOOK_S = 1.0  # whether the launcher is there
_MOST_BYTES = 4096

Report = Callable[[str], None]


def may_pass(error: BaseException) -> bool:
    """Whether an error is of the devices or their network, so that a new start may do.

    One of a device's memory would come again.

    Examples:
      >>> may_pass(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed"))
      True
    """
    is_of_runtime = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    # Where jaxlib converts a status by itself, it is a ValueError.
    is_of_network = re.match(r"[A-Z_]+: Gloo ", str(error)) is not None
    is_of_memory = str(error).startswith("RESOURCE_EXHAUSTED")
    return (is_of_runtime or is_of_network) and not is_of_memory


class Peer:
    """Another process, at the other end of a connection."""

    def __init__(self, number: int, connection: socket.socket):
        self.number, self.connection = number, connection
        self.progress = ""
        self.heard = time.monotonic()
        self.has_ended = False
        self._received = b""
        connection.settimeout(GRACE_S)

    def lines(self) -> list[str] | None:
        """What it has said since; None: the connection is closed."""
        try:
            received = self.connection.recv(_MOST_BYTES)
        except OSError:
            received = b""
        if not received:
            return None
        self.heard = time.monotonic()
        *whole, self._received = (self._received + received).split(b"\n")
        self._received = self._received[-_MOST_BYTES:]
        return [line.decode(errors="replace") for line in whole]

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(f"{line}\n".encode())


class _Fault(NamedTuple):
    """Why this process must end, and when."""

    line: str
    due: float


class Watch:
    """Sees that all processes of a run are alive, from a thread; ends this one if not.

    Process 0 is connected with each other one, and tells them whom it has lost. As a
    context manager it tells the others of the error that leaves the block, so that
    they do not wait for this process for ever.

    Processes may also be alive and wait for each other for ever, as in collectives that
    they call in different orders. So each also ends if its run makes no progress; the
    stacks of all its threads then are on the standard error.

    Args:
      connections: of process 0, one for each other process; of the others, that with
        process 0; by the number at the other end. None: there is nothing to watch.
      process_id: of this process.
      heartbeat: seconds without a sign of life after which a process is lost. One
        that was killed is lost at once.
      step_timeout: seconds without a new `note` after which this process ends, from the
        first one on; 0: never.
      launcher: the process that has started this one: without it, this one ends.
      end: called with the exit status, in place of `os._exit`.
    """

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        process_id: int = 0,
        *,
        heartbeat: float = HEARTBEAT_S,
        step_timeout: float = 0,
        launcher: int | None = None,
        end: Callable[[int], Any] = os._exit,
    ):
        self._peers = [Peer(*each) for each in connections.items()]
        self._process_id, self._heartbeat, self._end = process_id, heartbeat, end
        self._launcher, self._step_timeout = launcher, step_timeout
        self._noted: float | None = None
        self._is_stuck = False
        self._reports: list[Report] = []
        self._progress = ""
        self._fault: _Fault | None = None
        self._has_failed, self._status = False, 1
        self._has_left = False
        self._wake: socket.socket | None = None
        if self._peers or launcher is not None:
            self._wake, self._woken = socket.socketpair()  # ends the thread's waiting
            atexit.register(self.leave)
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            if self._peers:
                # It may come of the loss of another, which the thread is about to say.
                time.sleep(_SETTLE_S)
            self.fail(error)

    def note(self, progress: str) -> None:
        """Remembers how far this process is: `"step 12"`."""
        self._progress, self._noted = progress, time.monotonic()

    def rest(self) -> None:
        """Expects no progress until the next `note`."""
        self._noted = None

    @contextlib.contextmanager
    def reporting(self, report: Report) -> Iterator[None]:
        """In this block, `report` is called with the last line before the end."""
        self._reports.append(report)
        try:
            yield
        finally:
            self._reports.remove(report)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends because of an error."""
        self._has_failed, self._fault = True, None
        self._status = LOST if may_pass(error) else 1
        text = " ".join(f"{type(error).__name__}: {error}".split())
        for peer in self._peers:
            peer.tell(f"failed {self._process_id} {text}"[:_MOST_BYTES])

    def leave(self) -> None:
        """Tells the others that this process ends as it should, and stops watching."""
        if self._has_failed:
            return  # it waits for the others to end, which may be killed instead
        if not self._has_left:
            for peer in self._peers:
                peer.tell("bye")
        self._has_left = True
        if self._wake is not None:
            self._wake.close()

    # In the thread.

    def _run(self) -> None:
        every = self._heartbeat / _BEATS
        beaten = 0.0
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            selector.register(self._woken, selectors.EVENT_READ, None)
            while not self._has_left:
                now = time.monotonic()
                if now - beaten >= every:
                    beaten = now
                    for peer in self._peers:
                        peer.tell(f"alive {self._progress}")
                ready = selector.select(self._until_next(beaten + every))
                if time.monotonic() - now > 2 * every + 1:
                    # This process was stopped, and has not read what others said.
                    for peer in self._peers:
                        peer.heard = time.monotonic()
                for key, _ in ready:
                    if key.data is not None and not self._hear(key.data):
                        selector.unregister(key.data.connection)
                self._judge()

    def _until_next(self, beat: float) -> float:
        due = beat if self._fault is None else min(beat, self._fault.due)
        if self._launcher is not None:
            due = min(due, time.monotonic() + _LOOK_S)
        if self._step_timeout and self._noted is not None and not self._is_stuck:
            due = min(due, self._noted + self._step_timeout)
        return max(0.01, due - time.monotonic())

    def _hear(self, peer: Peer) -> bool:
        """Takes what a peer says; whether its connection is still open."""
        lines = peer.lines()
        if lines is None:
            if not peer.has_ended:
                peer.has_ended = True
                self._lose(peer.number, "its connection closed")
            return False
        for line in lines:
            word, _, rest = line.partition(" ")
            number, _, how = rest.partition(" ")
            if word == "alive":
                peer.progress = rest
            elif word == "bye":
                peer.has_ended = True
            elif word == "lost":
                self._lose(int(number), how)
            elif word == "stuck":
                self._print_stacks()
                self._suspect(f"process {number} made no progress for {how} s", 0)
                self._tell_others(line, peer)
            elif word == "failed":
                if not self._has_failed:
                    self._suspect(f"process {number} failed{{after}}: {how}", GRACE_S)
                self._tell_others(line, peer)
        return True

    def _judge(self) -> None:
        now = time.monotonic()
        for peer in self._peers:
            if not peer.has_ended and now - peer.heard > self._heartbeat:
                peer.has_ended = True
                self._lose(peer.number, f"no sign of life for {self._heartbeat:g} s")
        self._judge_progress(now)
        if self._launcher is not None and os.getppid() != self._launcher:
            self._suspect("the launcher was lost{after}", 0)
        if self._fault is not None and now >= self._fault.due:
            self._finish(self._fault.line)

    def _judge_progress(self, now: float) -> None:
        noted, timeout = self._noted, self._step_timeout
        if self._is_stuck or not timeout or noted is None or now - noted < timeout:
            return
        self._is_stuck = True
        for peer in self._peers:
            peer.tell(f"stuck {self._process_id} {timeout:g}")
        self._print_stacks()
        others = [
            f"; process {peer.number} is after {peer.progress}"
            for peer in self._peers
            if peer.progress not in ("", self._progress)
        ]
        line = f"no progress for {timeout:g} s{{after}}{''.join(others)}"
        self._suspect(line, 0)

    def _print_stacks(self) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            stack = "".join(traceback.format_stack(frame))
            name = names.get(ident, str(ident))
            where = f"process {self._process_id}, thread {name}"
            print(f"{where}:\n{stack}", file=sys.stderr, end="", flush=True)

    def _lose(self, number: int, how: str) -> None:
        if self._fault is None:
            self._tell_others(f"lost {number} {how}", None)
        self._suspect(f"process {number} was lost{{after}} ({how})", 0)

    def _suspect(self, line: str, grace: float) -> None:
        # The first line stays: a process that fails also closes its connection. A loss
        # ends the wait for the others, unless this process has failed, too, and is
        # about to end by itself.
        if self._has_failed:
            grace = GRACE_S
        due = time.monotonic() + grace
        if self._fault is None:
            self._fault = _Fault(line, due)
        else:
            self._fault = self._fault._replace(due=min(due, self._fault.due))

    def _tell_others(self, line: str, source: Peer | None) -> None:
        if self._process_id == 0:
            for peer in self._peers:
                if peer is not source:
                    peer.tell(line)

    def _finish(self, line: str) -> None:
        if self._has_left:
            return
        if self._has_failed:  # and has said why
            self._end(self._status)
            return
        after = f" after {self._progress}" if self._progress else ""
        line = line.replace("{after}", after, 1)
        line = f"{line}; start all processes again with --resume to continue"
        print(f"error: {line}.", file=sys.stderr, flush=True)
        self._report(line)
        self._end(LOST)

    def _report(self, line: str) -> None:
        """Calls the reports; a disk or lock that hangs must not hold up the end."""

        def run() -> None:
            for report in self._reports:
                with contextlib.suppress(Exception):
                    report(line)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(REPORT_S)
