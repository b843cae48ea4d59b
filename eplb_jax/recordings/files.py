"""Recorded expert loads: .npz, .npy, and JSON with `logical_count`.

A recording is a sequence of windows, each [layers, experts]: the arrays of an .npz
file in order, or the leading axis of a single array. JSON is the format that SGLang
reads as `--init-expert-location` (`sgl-project/sglang`,
`python/sglang/srt/eplb/expert_location.py`): an object with `logical_count`, which is
[layers, experts] or [steps, layers, experts].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eplb_jax.placement import check_size, read_npy, read_npz

# What a file may take in memory, and what of JSON, whose numbers take twenty times as
# much as in an array.
MAX_BYTES = 2**31
MAX_JSON_BYTES = 2**28


class Recording(NamedTuple):
    """Loads of a model in one or more windows of time.

    Attributes:
      names: names of the windows.
      counts: [windows, layers, experts] float64 loads.
    """

    names: tuple[str, ...]
    counts: np.ndarray


def read_loads(path: str | Path) -> Recording:
    """Reads a recording.

    Args:
      path: a file whose name ends in .npz, .npy or .json.

    Returns:
      A `Recording`.

    Raises:
      ValueError: if the file does not exist, cannot be read, has another suffix, or
        does not hold loads.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "loads.json"
      ...     _ = path.write_text('{"logical_count": [[[1, 2]], [[3, 4]]]}')
      ...     recording = read_loads(path)
      >>> recording.names, recording.counts.shape
      (('0', '1'), (2, 1, 2))
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".npy": _read_npy, ".json": _read_json}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: loads must be in a file ending in {', '.join(readers)}; convert "
            "a torch file with json.dump({'logical_count': counts.tolist()}, file)."
        )
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    try:
        named = readers[path.suffix](path)
    except RecursionError as error:
        raise ValueError(
            f"{path} is nested too deeply; loads are [layers, experts] or [windows, "
            "layers, experts]."
        ) from error
    except Exception as error:  # whatever a damaged file makes numpy or json raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error
    named = {name: _checked(path, name, counts) for name, counts in named.items()}
    if len(named) == 1:
        [counts] = named.values()
        if counts.ndim == 3:
            named = {str(i): window for i, window in enumerate(counts)}
    shapes = {name: counts.shape for name, counts in named.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(
            f"{path}: windows must all be [layers, experts] of one size, but they are "
            f"{shapes}."
        )
    return Recording(tuple(named), np.stack(list(named.values())))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    named = read_npz(path, MAX_BYTES)
    if not named:
        raise ValueError("the file holds no array.")
    return named


def _read_npy(path: Path) -> dict[str, np.ndarray]:
    check_size(path.stat().st_size, MAX_BYTES)
    with path.open("rb") as file:
        return {"0": read_npy(file)}


def _read_json(path: Path) -> dict[str, np.ndarray]:
    check_size(path.stat().st_size, MAX_JSON_BYTES)
    data = json.loads(path.read_text(encoding="utf-8"))
    counts = data.get("logical_count") if isinstance(data, dict) else data
    if counts is None:
        raise ValueError("the object has no `logical_count`.")
    return {"0": np.asarray(counts)}


def _checked(path: Path, name: str, counts: np.ndarray) -> np.ndarray:
    """Returns loads as float64."""
    if counts.ndim not in (2, 3) or counts.dtype.kind not in "iuf" or not counts.size:
        raise ValueError(
            f"{path}: window {name!r} is {counts.dtype}{list(counts.shape)}, but loads "
            "are numbers, [layers, experts] or [windows, layers, experts]."
        )
    with np.errstate(over="ignore"):  # of a longer type; it becomes infinite
        loads = counts.astype(np.float64)
    is_bad = ~(np.isfinite(loads) & (loads >= 0))
    if is_bad.any():
        at = tuple(int(i) for i in np.argwhere(is_bad)[0])
        raise ValueError(
            f"{path}: loads must be finite and not negative, but window {name!r} "
            f"holds {counts[at]} at {list(at)}."
        )
    return loads
