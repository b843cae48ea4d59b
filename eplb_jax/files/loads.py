"""Recorded expert loads, as engines write them.

A recording is a sequence of windows, each [layers, experts]: the arrays of an .npz or
.safetensors file in order, or the leading axis of a single array. What engines record
is an object with `logical_count`, [layers, experts] or [steps, layers, experts]: SGLang
as .pt or JSON, sglang-jax as .npy. vLLM writes .safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eplb_jax.files.contents import SUFFIXES, as_array, read_content, reading

_KEY = "logical_count"


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

    Code in a file is never run: pickles and torch's files are read by a reader that
    knows arrays, numbers, strings, lists and dicts.

    Args:
      path: a file whose name ends in .npz, .npy, .json, .pt or .safetensors, in
        letters of any case.

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
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: loads must be in a file ending in {', '.join(SUFFIXES)}."
        )
    with reading(path, "loads are [layers, experts] or [windows, layers, experts]"):
        named = _as_windows(read_content(path))
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


def _as_windows(data: Any) -> dict[str, np.ndarray]:
    """Returns the named arrays of what a file holds."""
    if isinstance(data, dict) and _KEY in data:
        data = data[_KEY]
    if isinstance(data, dict):
        if not data:
            raise ValueError("the file holds no array.")
        if not all(isinstance(each, np.ndarray) for each in data.values()):
            names = ", ".join(str(name)[:40] for name in [*data][:5])
            raise ValueError(f"the object has no `{_KEY}`, only {names}.")
        return data
    return {"0": data if isinstance(data, np.ndarray) else as_array(data)}


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
