"""Reads the header of safetensors files, and files of few and small tensors.

The format (huggingface/safetensors, README): the length of the header, 8 bytes, little
end first; the header, a JSON object that gives each tensor's dtype, shape and place in
what follows; then the tensors' bytes, rows first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eplb_jax.placement import check_size

LENGTH_BYTES = 8
# As the format's own library.
_MAX_HEADER = 100_000_000
_NUMBERS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}


class TensorInfo(NamedTuple):
    """What a header says about a tensor.

    Attributes:
      dtype: the format's name of its dtype.
      shape: its axes.
      start: first byte, counted from the start of the file.
      stop: one past the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path, dtypes: Mapping[str, np.dtype]) -> dict[str, TensorInfo]:
    """Returns what a file holds.

    Args:
      path: the file.
      dtypes: the format's names of dtypes; tensors of others are not checked.

    Raises:
      ValueError: the file is truncated, damaged, or of another format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, _MAX_HEADER):
            raise ValueError(
                f"{path} is truncated, or no safetensors file: it has {size} bytes, "
                f"but its header alone would have {length}; download it again."
            )
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {
            name: _info(entry, LENGTH_BYTES + length) for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} has a damaged header, or is no safetensors file; download it "
            "again."
        ) from None
    for name, info in found.items():
        if info.stop > size:
            raise ValueError(
                f"{path} is truncated: {name} ends at byte {info.stop}, but the file "
                f"at {size}; download it again."
            )
        dtype = dtypes.get(info.dtype)
        number = math.prod(info.shape)
        if dtype and info.stop - info.start != number * dtype.itemsize:
            raise ValueError(
                f"{path}: {name} has {info.stop - info.start} bytes, which are not "
                f"those of {info.dtype} {list(info.shape)}; download the file again."
            )
    return found


def read_safetensors(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads all tensors of a file.

    Args:
      path: the file.
      max_bytes: what they may take.

    Returns:
      The tensors by name, in the file's order.

    Raises:
      ValueError: see `read_header`, or the file is too large, or its tensors are of
        a dtype that NumPy lacks.
    """
    check_size(path.stat().st_size, max_bytes)
    infos = read_header(path, _NUMBERS)
    check_size(sum(info.stop - info.start for info in infos.values()), max_bytes)
    found = {}
    with path.open("rb") as file:
        for name, info in infos.items():
            if info.dtype not in _NUMBERS:
                raise ValueError(
                    f"{name} is {info.dtype}; loads are one of {', '.join(_NUMBERS)}."
                )
            file.seek(info.start)
            content = file.read(info.stop - info.start)
            found[name] = np.frombuffer(content, _NUMBERS[info.dtype])
            found[name] = found[name].reshape(info.shape)
    return found


def _info(entry: Mapping[str, Any], origin: int) -> TensorInfo:
    start, stop = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if min(start, stop - start, *shape, 0) < 0:
        raise ValueError
    return TensorInfo(str(entry["dtype"]), shape, origin + start, origin + stop)
