"""Text as bytes, or tokens: which files, what is held out, and the batch of a step.

A batch is a pure function of (data, seed, sequences seen before), so the only data
state of a run is that one number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dualpipe_jax.files import find_files, in_mixed_order, stdlib_files
from dualpipe_jax.tokens import (
    ByteTokenizer,
    NumberTokenizer,
    TokenDataset,
    Tokenizer,
    is_dataset,
)
from dualpipe_jax.train.shuffle import mix, permuted

_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens to train on and tokens held out; a text file's tokens are its bytes.

    Attributes:
      train: [num_train_tokens] of any integer dtype; uint8 for bytes.
      held_out: [num_held_out_tokens] of the same.
      source: what they are, for the reader of a log.
      tokenizer: what they mean.
    """

    train: np.ndarray
    held_out: np.ndarray
    source: str
    tokenizer: Tokenizer = dataclasses.field(default_factory=ByteTokenizer)

    @property
    def unit(self) -> str:
        """What one token is called, `"byte"` or `"token"`."""
        return self.tokenizer.unit

    def count_bytes(self, tokens: np.ndarray) -> int | None:
        """Bytes of the text that tokens stand for; None if that is not known.

        Examples:
          >>> data = np.arange(9, dtype=np.uint8)
          >>> Text(train=data, held_out=data, source="nine bytes").count_bytes(data)
          9
        """
        sizes = self.tokenizer.token_bytes
        return None if sizes is None else int(sizes[tokens].sum())


def load_text(
    paths: Sequence[str | Path] | None = None,
    *,
    sequence_length: int,
    held_out_fraction: float = 0.05,
) -> Text:
    """Reads the text to train on, or opens files of its tokens.

    Files are joined in a fixed order that mixes them, and the end of the result is
    held out: for many files that is a sample of whole files, for one its tail.

    A `.npy` file holds tokens: one axis, any integer dtype and vocabulary. A folder
    that `tokenize` has written holds tokens and their tokenizer. A single file of
    tokens is memory-mapped, so it may be larger than the memory; several are joined in
    memory.

    Args:
      paths: files or folders; None means the Python standard library's source.
      sequence_length: tokens that one sequence predicts; both parts must hold one
        sequence and the token after it.
      held_out_fraction: the part that is held out.

    Raises:
      ImportError: a folder with a tokenizer needs the package tokenizers.
      ValueError: a path does not exist, a token file cannot be read, text and tokens,
        or tokens of several tokenizers, are mixed, or there is too little of them.
    """
    files, tokenizer = _files_of(paths)
    is_tokens = not isinstance(tokenizer, ByteTokenizer)
    data = _read_tokens(files) if is_tokens else _read_bytes(files)
    unit = tokenizer.unit
    name = (
        "the Python standard library" if paths is None else ", ".join(map(str, paths))
    )
    size = f"{data.size / 1e6:.1f} {'M tokens' if is_tokens else 'MB'}"
    source = f"{name} ({len(files)} file{'s' * (len(files) != 1)}, {size})"
    if data.size == 0:
        raise ValueError(f"data is empty: {source}; give --data files with text.")
    num_held_out = int(data.size * held_out_fraction)
    if min(num_held_out, data.size - num_held_out) <= sequence_length:
        raise ValueError(
            f"data is too short: {source} has {data.size} {unit}s, of which "
            f"{num_held_out} are held out, but one sequence takes "
            f"{sequence_length + 1}; give more text or a smaller sequence_length."
        )
    split = data.size - num_held_out
    return Text(data[:split], data[split:], source, tokenizer)


def _files_of(paths: Sequence[str | Path] | None) -> tuple[list[Path], Tokenizer]:
    """The files that hold the data, in the order in which they are joined."""
    if paths is None:
        return in_mixed_order(stdlib_files()), ByteTokenizer()
    datasets = [TokenDataset.open(path) for path in paths if is_dataset(path)]
    others = [path for path in paths if not is_dataset(path)]
    files = find_files(others) if others or not datasets else []
    files = in_mixed_order([*files, *(each.path for each in datasets)])
    tokens = [file for file in files if file.suffix == ".npy"]
    if tokens and len(tokens) < len(files):
        text = next(file for file in files if file.suffix != ".npy")
        raise ValueError(
            f"data paths hold tokens ({tokens[0]}) and text ({text}), which are not "
            "of one vocabulary; give either."
        )
    if not datasets:
        return files, NumberTokenizer() if tokens else ByteTokenizer()
    first = datasets[0].tokenizer
    for other in (each.tokenizer for each in datasets):
        if other.digest != first.digest:
            raise ValueError(
                f"data paths hold tokens of several tokenizers ({first.folder} and "
                f"{other.folder}); give those of one."
            )
    return files, first


def train_batch(
    data: np.ndarray,
    shape: tuple[int, int],
    sequence_length: int,
    *,
    seed: int,
    position: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The sequences `position`, `position + 1`, ... of an endless shuffled order.

    The order consists of epochs. Each cuts the data into windows that do not overlap,
    from another offset, and visits each window once, in another order. Where sequence
    n starts is computed from (seed, n) alone, so a run can be resumed, at any batch
    size, from the number of sequences that it has seen.

    Args:
      data: [num_tokens] integers.
      shape: (num_microbatches, microbatch).
      sequence_length: tokens that one sequence predicts.
      seed: of the run.
      position: sequences seen before; any non-negative integer below 2^63.

    Returns:
      (inputs, targets), each [num_microbatches, microbatch, sequence] int32; a
      target is the token after its input.

    Examples:
      >>> data = np.arange(100, dtype=np.uint8)
      >>> inputs, targets = train_batch(data, (2, 3), 8, seed=0, position=12)
      >>> inputs.shape, bool((targets == inputs + 1).all())
      ((2, 3, 8), True)
    """
    numbers = position + np.arange(shape[0] * shape[1], dtype=np.int64)
    starts = window_starts(numbers, data.size, sequence_length, seed=seed)
    return _windows(data, starts.reshape(shape), sequence_length)


def window_starts(
    numbers: np.ndarray, num_tokens: int, sequence_length: int, *, seed: int
) -> np.ndarray:
    """Where the sequences of `train_batch`'s order start.

    Args:
      numbers: [n] int64, of the sequences.
      num_tokens: of the data; more than `sequence_length`.
      sequence_length: tokens that one sequence predicts.
      seed: of the run.

    Returns:
      [n] int64, each below num_tokens - sequence_length.

    Examples:
      >>> starts = window_starts(np.arange(9), 100, 10, seed=0)  # one epoch
      >>> np.unique(np.diff(np.sort(starts))).tolist()
      [10]
    """
    # As many windows as fit behind every offset, so that all epochs are equal.
    per_epoch = max(1, num_tokens // sequence_length - 1)
    num_offsets = min(sequence_length, num_tokens - per_epoch * sequence_length)
    epochs, indices = np.divmod(numbers, per_epoch)
    keys = mix(epochs.astype(np.uint64) + mix(np.uint64(seed % 2**64)))
    offsets = (mix(keys) % np.uint64(num_offsets)).astype(np.int64)
    return offsets + permuted(indices, per_epoch, keys) * sequence_length


def held_out_batch(
    data: np.ndarray, shape: tuple[int, int], sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences spread evenly over `data`: always the same ones.

    Arguments and results are those of `train_batch`, without seed and position.
    """
    last = data.size - sequence_length - 1
    starts = np.linspace(0, last, num=shape[0] * shape[1]).astype(np.int64)
    return _windows(data, starts.reshape(shape), sequence_length)


def _windows(
    data: np.ndarray, starts: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    windows = data[starts[..., None] + np.arange(sequence_length + 1)]
    if windows.min() < 0 or windows.max() > _INT32_MAX:
        raise ValueError(
            f"the data has tokens from {windows.min()} to {windows.max()}; each must "
            "lie between 0 and 2^31 - 1."
        )
    windows = windows.astype(np.int32)
    return windows[..., :-1], windows[..., 1:]


def _read_bytes(files: Sequence[Path]) -> np.ndarray:
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def _read_tokens(files: Sequence[Path]) -> np.ndarray:
    arrays = []
    for file in files:
        try:
            array = np.lib.format.open_memmap(file, mode="r")
        except (ValueError, EOFError, OverflowError) as error:
            raise ValueError(
                f"token file {file} is not a readable .npy file ({error}); write it "
                "with numpy.save."
            ) from error
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"token file {file} holds {array.dtype} of shape {array.shape}; it "
                "must hold integers in one axis."
            )
        if arrays and array.dtype != arrays[0].dtype:
            raise ValueError(
                f"token file {file} holds {array.dtype}, but {files[0]} holds "
                f"{arrays[0].dtype}; save all with one dtype."
            )
        arrays.append(array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
