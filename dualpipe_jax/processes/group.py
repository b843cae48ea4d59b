"""The processes of one run on one machine: started together, ended together."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

from dualpipe_jax.processes.watch import LOST

LAUNCHER = "DUALPIPE_JAX_LAUNCHER"  # in a process's environment: its parent
_POLL_S = 0.05
_MOST_LINES = 40
_CHATTER = b"[Gloo] "


def launcher() -> int | None:
    """The process that has started this one, and must not leave it behind."""
    number = os.environ.get(LAUNCHER, "")
    return int(number) if number.isdecimal() else None


class Ended(NamedTuple):
    """How a group has ended.

    Attributes:
      statuses: of all processes; negative: the signal that ended it.
      first: the process that ended first other than with status 0, or None.
      lines: the last lines that it printed; none of process 0, which prints by itself.
    """

    statuses: tuple[int, ...]
    first: int | None
    lines: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """What the first one has met, in words."""
        if self.first is None:
            return "all processes ended"
        status = self.statuses[self.first]
        if status >= 0:
            return f"process {self.first} ended with status {status}"
        with contextlib.suppress(ValueError):
            return f"process {self.first} was ended by {signal.Signals(-status).name}"
        return f"process {self.first} was ended by signal {-status}"


class Group:
    """Processes that run.

    Process 0 has this process's output; of the others the last lines are kept.

    Args:
      commands: one for each.
      environments: added to this process's; one for each.
      grace: seconds after the first has failed within which the others end by
        themselves; then they are killed.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        *,
        grace: float,
    ):
        self._grace = grace
        self._lines = [
            collections.deque[str](maxlen=_MOST_LINES) for _ in range(len(commands))
        ]
        self._readers: list[threading.Thread] = []
        self._processes: list[subprocess.Popen] = []
        self.num_signals = 0
        try:
            for command, environment in zip(commands, environments, strict=True):
                self._start(command, environment)
        except BaseException:
            self.kill()
            raise

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        number = len(self._processes)
        output = None if number == 0 else subprocess.PIPE
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, LAUNCHER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output and subprocess.STDOUT,
            # Ctrl-C reaches this process only, which sends one signal on.
            start_new_session=True,
        )
        self._processes.append(process)
        if process.stdout is not None:
            reader = threading.Thread(
                target=self._read, args=(process.stdout, number), daemon=True
            )
            reader.start()
            self._readers.append(reader)

    def _read(self, output: IO[bytes], number: int) -> None:
        with output:
            for line in output:
                if not line.startswith(_CHATTER):
                    self._lines[number].append(line.decode(errors="replace").rstrip())

    def signal(self, number: int) -> None:
        """Sends a signal on: to one process, which stops all; the second to all."""
        self.num_signals += 1
        for process in self._processes[: 1 if self.num_signals == 1 else None]:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> Ended:
        """Waits until all have ended; kills those that outlive a failed one."""
        first, deadline = None, float("inf")
        while True:
            statuses = [process.poll() for process in self._processes]
            if first is None:
                failed = [i for i, status in enumerate(statuses) if status]
                if failed:
                    # Those that were lost, not those that have noticed it.
                    first = min(failed, key=lambda i: (statuses[i] == LOST, i))
                    deadline = time.monotonic() + self._grace
            ended = [status for status in statuses if status is not None]
            if len(ended) == len(statuses):
                break
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(_POLL_S)
        for reader in self._readers:
            reader.join(1)
        lines = () if first is None else tuple(self._lines[first])
        return Ended(tuple(ended), first, lines)

    def kill(self) -> None:
        """Ends all at once, also one that is stopped."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
