"""What the processes of a run must have in common, compared before they do anything."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import zlib
from typing import Any

from dualpipe_jax.processes import distributed
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.data import Text
from dualpipe_jax.train.data_order import digest
from dualpipe_jax.train.folder import Resume


def check_agreement(
    config: TrainConfig, text: Text, folder: str | os.PathLike[str], resume: Resume
) -> None:
    """Checks that all processes were started alike; processes that were not would hang.

    Raises:
      ValueError: they were not; in all processes.
    """
    if distributed.num_processes() == 1:
        return
    facts: dict[str, Any] = json.loads(config.to_json())
    facts |= {
        "out": os.fspath(folder),
        "resume": resume,
        "data": [digest(text.train), digest(text.held_out)],
    }
    for name in ("dualpipe-jax", "jax", "jaxlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    distributed.agree({name: _in_words(value) for name, value in facts.items()})


def _in_words(value: Any) -> str:
    """A value as JSON; a long one with a checksum in place of its end.

    Examples:
      >>> _in_words({"pp": 2})
      '{"pp": 2}'
    """
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value))  # of objects in a config
    short = f"{text[:60]}... ({zlib.crc32(text.encode()):08x})"
    return text if len(text) <= len(short) else short
