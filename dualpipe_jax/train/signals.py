"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects SIGTERM and SIGINT in a list; a second signal has its usual effect."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python allows handlers in the main thread only.
        return
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.getsignal(name) for name in names}

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    def receive(number: int, _) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for name in names:
        signal.signal(name, receive)
    try:
        yield received
    finally:
        restore()
