"""Text as bytes: which files, which bytes are held out, and the batch of each step.

The batch of a step is a pure function of (text, seed, step), so a run that resumes
needs no data state.
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

# Not part of the library's source proper, or not on every machine.
_STDLIB_EXCLUDED = frozenset(
    ["__pycache__", "dist-packages", "idlelib", "site-packages", "test", "tests"]
)


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out.

    Attributes:
      train: [num_train_bytes] uint8.
      held_out: [num_held_out_bytes] uint8.
      source: what they are, for the reader of a log.
    """

    train: np.ndarray
    held_out: np.ndarray
    source: str


def stdlib_files() -> list[Path]:
    """The Python standard library's source files, in order of their relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    return [f for f in _files_below(root, _STDLIB_EXCLUDED) if f.suffix == ".py"]


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that are meant by `paths`: files, and the files below folders.

    Hidden files and folders are left out, unless they are named themselves.

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
                f"data path {path} is no file or folder; give one that is."
            )
    if not files:
        raise ValueError(
            f"data paths {', '.join(map(str, paths))} hold no file; give files or "
            "folders with text in them."
        )
    return files


def load_text(
    paths: Sequence[str | Path] | None = None,
    *,
    sequence_length: int,
    held_out_fraction: float = 0.05,
) -> Text:
    """Reads the text to train on.

    Files are joined in a fixed order that mixes them, and the end of the result is
    held out: for many files that is a sample of whole files, for one its tail.

    Args:
      paths: files or folders; None means the Python standard library's source.
      sequence_length: bytes that one sequence predicts; both parts must hold one
        sequence and the byte after it.
      held_out_fraction: the part that is held out.

    Raises:
      ValueError: a path does not exist, or there is too little text.
    """
    files = stdlib_files() if paths is None else find_files(paths)
    order = np.random.default_rng(0).permutation(len(files))
    data = np.frombuffer(b"".join(files[i].read_bytes() for i in order), np.uint8)
    name = (
        "the Python standard library" if paths is None else ", ".join(map(str, paths))
    )
    source = f"{name} ({len(files)} files, {data.size / 1e6:.1f} MB)"
    if data.size == 0:
        raise ValueError(f"data is empty: {source}; give --data files with text.")
    num_held_out = int(data.size * held_out_fraction)
    if min(num_held_out, data.size - num_held_out) <= sequence_length:
        raise ValueError(
            f"data is too short: {source} has {data.size} bytes, of which "
            f"{num_held_out} are held out, but one sequence takes "
            f"{sequence_length + 1}; give more text or a smaller sequence_length."
        )
    split = data.size - num_held_out
    return Text(train=data[:split], held_out=data[split:], source=source)


def sample_batch(
    data: np.ndarray,
    shape: tuple[int, int],
    sequence_length: int,
    *,
    seed: int,
    step: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences from random places: the batch of `step`, whatever was drawn before.

    Args:
      data: [num_bytes] uint8.
      shape: (num_microbatches, microbatch).
      sequence_length: bytes that one sequence predicts.
      seed: of the run.
      step: of the run.

    Returns:
      (inputs, targets), each [num_microbatches, microbatch, sequence] int32; a
      target is the byte after its input.

    Examples:
      >>> data = np.arange(100, dtype=np.uint8)
      >>> inputs, targets = sample_batch(data, (2, 3), 8, seed=0, step=5)
      >>> inputs.shape, bool((targets == inputs + 1).all())
      ((2, 3, 8), True)
    """
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, data.size - sequence_length, size=shape)
    return _windows(data, starts, sequence_length)


def held_out_batch(
    data: np.ndarray, shape: tuple[int, int], sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences spread evenly over `data`: always the same ones.

    Takes and returns what `sample_batch` does, but for the seed and the step.
    """
    last = data.size - sequence_length - 1
    starts = np.linspace(0, last, num=shape[0] * shape[1]).astype(np.int64)
    return _windows(data, starts.reshape(shape), sequence_length)


def _windows(
    data: np.ndarray, starts: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    windows = data[starts[..., None] + np.arange(sequence_length + 1)].astype(np.int32)
    return windows[..., :-1], windows[..., 1:]


def _files_below(folder: Path, excluded: frozenset[str] = frozenset()) -> list[Path]:
    """All files but those in excluded or hidden folders, by their relative path."""
    files = []
    for parent, folders, names in os.walk(folder):
        # In place: os.walk then does not enter them.
        folders[:] = [f for f in folders if f not in excluded and f[0] != "."]
        files += [Path(parent, name) for name in names if name[0] != "."]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())
