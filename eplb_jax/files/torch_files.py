"""Reads files of `torch.save`, without torch."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from eplb_jax.files.pickles import read_pickle
from eplb_jax.placement import check_size

MAX_PICKLE_BYTES = 2**26


def read_torch(path: Path, max_bytes: int) -> Any:
    """Reads a file of `torch.save`, tensors as arrays.

    Args:
      path: the file.
      max_bytes: what its tensors may take.

    Returns:
      See `read_pickle`.

    Raises:
      ValueError: it is too large, damaged, of torch before 1.6, or holds something
        else than tensors, numbers and strings.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            "it is no file of torch.save since torch 1.6, or it is truncated."
        )
    with zipfile.ZipFile(path) as file:
        members = {member.filename: member for member in file.infolist()}
        check_size(sum(member.file_size for member in members.values()), max_bytes)
        top = next((name for name in members if name.endswith("/data.pkl")), None)
        if top is None:
            raise ValueError("it has no member data.pkl, as torch.save writes.")
        check_size(members[top].file_size, MAX_PICKLE_BYTES)
        folder = top.removesuffix("data.pkl")
        order = "<"
        if f"{folder}byteorder" in members:
            order = ">" if file.read(f"{folder}byteorder") == b"big" else "<"
        storages: dict[str, np.ndarray] = {}

        def read_storage(key: str, dtype: np.dtype) -> np.ndarray:
            if key not in storages:
                content = file.read(members[f"{folder}data/{key}"])
                storages[key] = np.frombuffer(content, dtype.newbyteorder(order))
            return storages[key]

        return read_pickle(file.read(top), read_storage)
