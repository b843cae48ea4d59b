"""Reads and writes safetensors files, a part of a tensor at a time.

`eplb_jax.files` describes the format.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eplb_jax.files import LENGTH_BYTES, read_header

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}


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
        self.tensors = read_header(path, DTYPES)
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
    text += b" " * (-len(text) % LENGTH_BYTES)  # so that tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        file.write(text)
        for array in arrays:
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)
