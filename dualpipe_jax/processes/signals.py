"""SIGTERM and SIGINT, handled in a block."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handled(receive: Callable[[int, Callable[[], None]], Any]) -> Iterator[None]:
    """Has both signals call a function; other threads than the main one cannot.

    Args:
      receive: takes the signal's number, and a function that gives both signals back
        the effect that they had before the block.
    """
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    # Python allows handlers in the main thread only.
    if threading.current_thread() is threading.main_thread():
        names = (signal.SIGTERM, signal.SIGINT)
        before |= {name: signal.getsignal(name) for name in names}
        for name in names:
            signal.signal(name, lambda number, _: receive(number, restore))
    try:
        yield
    finally:
        restore()
