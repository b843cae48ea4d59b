"""Which files paths name, in an order that depends on their names only."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

# Not part of the library's source proper, or not on every machine.
_STDLIB_EXCLUDED = frozenset(
    ["__pycache__", "dist-packages", "idlelib", "site-packages", "test", "tests"]
)


def stdlib_files() -> list[Path]:
    """The Python standard library's source files, in order of their relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    return [f for f in _files_below(root, _STDLIB_EXCLUDED) if f.suffix == ".py"]


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """Finds the files that `paths` name: files, and all files below folders.

    Hidden files and folders are left out, unless a path names them. So is what cannot
    be read as a file: pipes, sockets, links that lead nowhere.

    Raises:
      ValueError: a path does not exist, or there is no file at all.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += _files_below(path)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(
                f"data path {path} is not a file or folder; give one that exists."
            )
    if not files:
        raise ValueError(
            f"data paths {', '.join(map(str, paths))} hold no file; give files or "
            "folders with text in them."
        )
    return files


def in_mixed_order(files: Sequence[Path]) -> list[Path]:
    """The files in a fixed order that mixes them, so that the last are a sample."""
    order = np.random.default_rng(0).permutation(len(files))
    return [files[i] for i in order]


def _files_below(folder: Path, excluded: frozenset[str] = frozenset()) -> list[Path]:
    """All files except in excluded or hidden folders, sorted by relative path."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        # In place: os.walk then does not enter them.
        folders[:] = [f for f in folders if f not in excluded and f[0] != "."]
        paths = (Path(parent, name) for name in names if name[0] != ".")
        files += [path for path in paths if path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())
