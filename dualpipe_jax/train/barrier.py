"""Barriers of orbax's threads that end early when one process cannot go on.

Of several processes that write a checkpoint, one may fail where the others do not:
it was the last to write to the disk that was full. Orbax lets the others wait for
it at a barrier for as long as a save may take.
"""

from __future__ import annotations

import sys
import threading

import orbax.checkpoint as ocp

from dualpipe_jax.processes import distributed

_COMPLETE_MS = 60_000


class AbandonedError(Exception):
    """Another process could not write."""


class Barrier:
    """Orbax's own barrier, for `AsyncOptions.barrier_sync_fn`, with a way out.

    Attributes:
      error: why this process's save failed, if that is known yet: orbax synchronizes
        once more while the error propagates.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._wait = ocp.multihost.get_barrier_sync_fn()
        self._lock = threading.Lock()
        self._abandoned = threading.Event()
        self._waiting_at: set[str] = set()

    def abandon(self) -> None:
        """Ends every wait, now and later; all processes call this together."""
        with self._lock:
            self._abandoned.set()
            mine = set(self._waiting_at)
        # A waiting thread cannot be interrupted, and must not be left behind: Python
        # would abort at exit. So each barrier is completed.
        for keys in distributed.all_texts(" ".join(sorted(mine))):
            for key in keys.split(" ") if keys else []:
                if key not in mine:
                    mine.add(key)
                    self._wait(key=key, timeout_ms=_COMPLETE_MS)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes. Orbax's threads call this."""
        self.error = self.error or sys.exc_info()[1]
        with self._lock:
            if not self._abandoned.is_set():
                self._waiting_at.add(key)
        try:
            if key in self._waiting_at:
                self._wait(key=key, timeout_ms=timeout_ms)
        finally:
            self._waiting_at.discard(key)
        if self._abandoned.is_set():
            raise AbandonedError("another process could not write")
