"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from dualpipe_jax.processes import handled


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects SIGTERM and SIGINT in a list; a second signal has its usual effect."""
    received: list[str] = []

    def receive(number: int, restore: Callable[[], None]) -> None:
        received.append(signal.Signals(number).name)
        restore()

    with handled(receive):
        yield received
