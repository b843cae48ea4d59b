"""Several processes as one run: how they meet, and how they agree.

All that a process learns of the others goes through here; with one process every
function below is as if the others had nothing to say.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

_TEXT_BYTES = 256


def is_main() -> bool:
    """Whether this process writes what is written once: process 0 does."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_said(text: str | None) -> str | None:
    """What the first process has to say that says anything; all learn the same.

    Args:
      text: a line, cut off after 256 bytes where there are several processes; None
        if there is nothing to say.

    Examples:
      >>> first_said(None), first_said("SIGTERM")
      (None, 'SIGTERM')
    """
    if jax.process_count() == 1:
        return text
    line = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = (text or "").encode()[:_TEXT_BYTES]
    line[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    lines = np.asarray(multihost_utils.process_allgather(line))
    said = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in lines)
    return next((text for text in said if text), None)
