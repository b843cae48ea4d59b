"""Reads NumPy's files, also those that are damaged or of somebody else."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import IO

import numpy as np


def read_npz(path: Path, max_bytes: int | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz file.

    Args:
      path: the file.
      max_bytes: what its arrays may take; None: any size.

    Returns:
      The arrays by name, in the file's order.

    Raises:
      ValueError: if the file is too large, damaged, or holds something else.
      OSError: if it cannot be opened.
    """
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            check_size(sum(member.file_size for member in members), max_bytes)
            arrays = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name == member.filename:
                    raise ValueError(f"its member {name!r} is no array (.npy).")
                with file.open(member) as array:
                    arrays[name] = read_npy(array)
            return arrays
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever damage makes zipfile and zlib raise
        raise ValueError(str(error)[:200] or type(error).__name__) from error


def read_npy(file: IO[bytes]) -> np.ndarray:
    """Reads an .npy file.

    Args:
      file: opened, in binary mode.

    Raises:
      ValueError: if it is damaged, or holds Python objects.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # an error says it all
            return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        # What numpy advises would run whatever code is in the file.
        raise ValueError(
            "it holds Python objects and no numbers; save the counts alone, with "
            "numpy.save(path, numpy.asarray(counts, float))."
        ) from error


def check_size(num_bytes: int, max_bytes: int | None) -> None:
    """Raises ValueError for a file that is too large to be read.

    Args:
      num_bytes: of the file.
      max_bytes: None: any size.

    Raises:
      ValueError: if there are more bytes.
    """
    if max_bytes is not None and num_bytes > max_bytes:
        raise ValueError(
            f"it has {num_bytes / 1e9:,.1f} GB, more than {max_bytes / 1e9:.1f}; sum "
            "the counts of many steps, or read fewer windows."
        )
