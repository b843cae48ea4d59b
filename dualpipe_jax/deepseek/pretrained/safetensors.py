"""Reads and writes safetensors files, a part of a tensor at a time.

The format (huggingface/safetensors, README): the length of the header, 8 bytes, little
end first; the header, a JSON object that gives each tensor's dtype, shape and place in
what follows; then the tensors' bytes, rows first.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}
_LENGTH = 8
# As the format's own library.
_MAX_HEADER = 100_000_000


class TensorInfo(NamedTuple):
    """What a header says about a tensor.

    Attributes:
      dtype: a key of `DTYPES`.
      shape: its axes.
      start: first byte, counted from the start of the file.
      stop: one past the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class File:
    """A file whose tensors are read on demand."""

    def __init__(self, path: Path):
        """Reads the header.

        Raises:
          ValueError: the file is missing, truncated, or of another format.
        """
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path} is missing; download it.")
        self.tensors = _read_header(path)
        self._bytes: mmap.mmap | None = None

    def read(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """Returns a part of a tensor of one or two axes, as a copy.

        Args:
          name: of the tensor.
          rows: of its first axis.
          columns: of its second axis, if it has one.
        """
        info = self.tensors[name]
        if info.start == info.stop:
            return np.zeros(info.shape, DTYPES[info.dtype])
        if self._bytes is None:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = np.frombuffer(
            self._bytes, DTYPES[info.dtype], math.prod(info.shape), info.start
        ).reshape(info.shape)
        part = whole[rows] if whole.ndim == 1 else whole[rows, columns]
        part = np.array(part)
        # Pages that were read would stay in memory as long as the file is mapped.
        if hasattr(mmap, "MADV_DONTNEED"):
            first = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_DONTNEED, first, info.stop - first)
        return part


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns what a file holds; see `File` for what it raises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > min(size - _LENGTH, _MAX_HEADER):
            raise ValueError(
                f"{path} is truncated, or no safetensors file: it has {size} bytes, "
                f"but its header alone would have {length}; download it again."
            )
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {
            name: _info(entry, _LENGTH + length) for name, entry in entries.items()
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
        dtype = DTYPES.get(info.dtype)
        number = math.prod(info.shape)
        if dtype and info.stop - info.start != number * dtype.itemsize:
            raise ValueError(
                f"{path}: {name} has {info.stop - info.start} bytes, which are not "
                f"those of {info.dtype} {list(info.shape)}; download the file again."
            )
    return found


def _info(entry: Mapping[str, Any], origin: int) -> TensorInfo:
    start, stop = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    return TensorInfo(str(entry["dtype"]), shape, origin + start, origin + stop)


def write_file(
    path: Path,
    infos: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes a file, one tensor at a time.

    Args:
      path: of the file.
      infos: for each tensor its dtype, a key of `DTYPES`, and its shape.
      arrays: the tensors, in the same order and of these dtypes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in infos.items():
        stop = at + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # so that tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little"))
        file.write(text)
        for array in arrays:
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)
