"""What files hold, as plain data: arrays, objects, lists of numbers."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eplb_jax.files.pickles import read_pickle
from eplb_jax.files.safetensors import read_safetensors
from eplb_jax.files.torch_files import read_torch
from eplb_jax.placement import check_size, read_npy, read_npz

# What a file may take in memory, and what of JSON and pickles, whose numbers may take
# twenty times as much as in an array.
MAX_BYTES = 2**31
MAX_TEXT_BYTES = 2**28
# Numbers in lists, which a small pickle may repeat without end.
MAX_LISTED = 2**25


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Makes whatever a damaged file raises a ValueError of one line.

    Args:
      path: the file.
      what: says what it should hold.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; {what}.") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error


def read_content(path: Path) -> Any:
    """Returns what a file holds: arrays, or an object or lists with numbers in them.

    Args:
      path: its name ends in one of `SUFFIXES`, in letters of any case.

    Raises:
      ValueError: it is too large, or holds code. See `reading` for damaged ones.
    """
    return _READERS[path.suffix.lower()](path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    return read_npz(path, MAX_BYTES)


def _read_npy(path: Path) -> Any:
    """Returns the array of an .npy file, or the plain data that is pickled in it."""
    check_size(path.stat().st_size, MAX_BYTES)
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        with warnings.catch_warnings(action="ignore"):  # an error says it all
            _, _, dtype = read(file)
        if not dtype.hasobject:
            file.seek(0)
            return read_npy(file)
        check_size(path.stat().st_size, MAX_TEXT_BYTES)
        return read_pickle(file.read())


def _read_json(path: Path) -> Any:
    """Returns what a JSON file holds."""
    check_size(path.stat().st_size, MAX_TEXT_BYTES)
    return json.loads(path.read_text(encoding="utf-8"))


_READERS = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".json": _read_json,
    ".pt": functools.partial(read_torch, max_bytes=MAX_BYTES),
    ".safetensors": functools.partial(read_safetensors, max_bytes=MAX_BYTES),
}
SUFFIXES = tuple(_READERS)


def as_array(data: Any) -> np.ndarray:
    """Returns the numbers of nested lists, which may share their parts."""
    num_listed = 0
    level = [data]
    for _ in range(3):
        level = [each for part in level if isinstance(part, list) for each in part]
        num_listed += sum(getattr(each, "size", 1) for each in level)
        if num_listed > MAX_LISTED:
            raise ValueError(f"it lists more than {MAX_LISTED} numbers.")
    if any(isinstance(each, list | tuple | dict) for each in level):
        raise ValueError("its lists are nested more deeply than three times.")
    return np.asarray(data)
