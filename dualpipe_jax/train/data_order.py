"""What decides the order of a run's data; a run that resumes says if it has changed."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.data import Text

# Of tokens that are read; all of a large file would take long.
_NUM_BLOCKS, _BLOCK = 64, 65_536


def data_order(config: TrainConfig, text: Text) -> dict[str, Any]:
    """What a checkpoint records about the order of the data; JSON."""
    return {
        "seed": config.seed,
        "sequence_length": config.sequence_length,
        "data": text.source,
        "digest": [digest(text.train), digest(text.held_out)],
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How two results of `data_order` differ, for a reader of a log.

    Examples:
      >>> old = {"seed": 0, "sequence_length": 8, "data": "a.txt (8.0 MB)", "digest": 1}
      >>> differences(old, old | {"seed": 1, "data": "/data/a.txt (8.0 MB)"})
      ['seed=1, not 0']
      >>> differences(old, old | {"data": "b.txt (8.0 MB)", "digest": 2})
      ['other data: b.txt (8.0 MB), not a.txt (8.0 MB)']
    """
    found = [
        f"{name}={new[name]}, not {old.get(name)}"
        for name in ("seed", "sequence_length")
        if old.get(name) != new[name]
    ]
    # The same files may have another path, or be stored in another dtype.
    if old.get("digest") != new["digest"]:
        found.append(f"other data: {new['data']}, not {old.get('data')}")
    return found


def digest(tokens: np.ndarray) -> str:
    """Tells data apart by their number and some of them, whatever their dtype.

    Args:
      tokens: [n] integers; at most four million of them are read, from all parts.

    Examples:
      >>> digest(np.arange(9, dtype=np.uint8)) == digest(np.arange(9))
      True
      >>> digest(np.arange(9)) == digest(np.arange(1, 10))
      False
    """
    crc = 0
    last = max(0, tokens.size - _BLOCK)
    for start in np.unique(np.linspace(0, last, _NUM_BLOCKS).astype(np.int64)):
        crc = zlib.crc32(tokens[start : start + _BLOCK].astype("<i8").tobytes(), crc)
    return f"{tokens.size}-{crc:08x}"
