"""Writes a folder of tokens from files of text; a killed writer continues."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dualpipe_jax.files import Lock, remove_unfinished, replace_text
from dualpipe_jax.tokens.dataset import (
    INFO_FILE,
    PROGRESS_FILE,
    TOKENS_FILE,
    DatasetInfo,
    is_dataset,
)
from dualpipe_jax.tokens.documents import Piece, read_pieces
from dualpipe_jax.tokens.published import PublishedTokenizer, copy_tokenizer

GROUP_CHARACTERS = 2**24


class Progress(NamedTuple):
    """How far the writer is.

    Attributes:
      num_bytes_read: of the files.
      num_bytes: sizes of all files.
      num_tokens: that are written.
    """

    num_bytes_read: int
    num_bytes: int
    num_tokens: int


@dataclasses.dataclass
class _State:
    """What is written: all of some files, and pieces of the one after them."""

    num_files: int = 0
    num_pieces: int = 0
    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0


def write_tokens(
    files: Sequence[Path],
    tokenizer: PublishedTokenizer,
    out: str | os.PathLike[str],
    *,
    source: str,
    field: str = "text",
    end_token: int | None = None,
    group_characters: int = GROUP_CHARACTERS,
    report: Callable[[Progress], Any] = lambda progress: None,
) -> DatasetInfo:
    """Writes the tokens of all documents into a folder, and the tokenizer beside them.

    What an earlier call with the same arguments has left unfinished is continued; what
    it has finished stays as it is.

    Args:
      files: in the order of their documents; see `documents.read_pieces`.
      tokenizer: of the tokens.
      out: the folder.
      source: what the files are, for the reader of a log.
      field: name of the text in JSON lines and Parquet.
      end_token: follows each document; None: the tokenizer's own.
      group_characters: text that is encoded together, by all cores, and then written.
      report: called after each group.

    Raises:
      ValueError: the folder holds something else, another process writes it, a file
        cannot be read or holds no text, or the tokenizer has no end token.
    """
    end_token = tokenizer.end_token if end_token is None else end_token
    if end_token is None:
        raise ValueError(
            f"{tokenizer.folder} names no eos_token, which separates documents; name "
            "a token with --end-token."
        )
    sizes = [path.stat().st_size for path in files]
    settings = {
        "tokenizer": tokenizer.digest,
        "field": field,
        "end token": end_token,
        "list of files": _digest(
            [(os.fspath(f), n) for f, n in zip(files, sizes, strict=True)]
        ),
    }
    out = Path(out)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out)
    if holder := lock.acquire():
        raise ValueError(f"{out} is being written by {holder}; use another --out.")
    try:
        for name in (PROGRESS_FILE, INFO_FILE):
            remove_unfinished(out / name)
        state, is_complete = _left(out, settings)
        if not is_complete:
            _save(out / PROGRESS_FILE, {"settings": settings}, state)
            copy_tokenizer(tokenizer.folder, out)
            pieces = _pieces(files, field, state)
            groups = _groups(pieces, group_characters)
            _write(out, groups, sizes, tokenizer, settings, state, report)
            if not state.num_documents:
                raise ValueError(f"{source} holds no text; give other files.")
            about = {"source": source, "settings": settings, "end_token": end_token}
            _save(out / INFO_FILE, about | {"tokenizer": tokenizer.digest}, state)
            (out / PROGRESS_FILE).unlink()
    finally:
        lock.release()
    return DatasetInfo.read(out / INFO_FILE)


def check_folder(out: str | os.PathLike[str]) -> None:
    """Raises a ValueError if a folder holds anything but tokens."""
    out = Path(out)
    if is_dataset(out) or not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder.")
    if others := [path.name for path in out.iterdir() if path.name[0] != "."]:
        raise ValueError(f"{out} holds {others[0]}; use an empty or new folder.")


def _left(out: Path, settings: dict[str, Any]) -> tuple[_State, bool]:
    """What an earlier call has left, and whether it is complete.

    Raises:
      ValueError: it was called with other arguments, or something else is there.
    """
    path = out / PROGRESS_FILE
    if not path.is_file():
        path = out / INFO_FILE
    if not path.is_file():
        return _State(), False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        old = dict(found["settings"])
        names = [field.name for field in dataclasses.fields(_State)]
        state = _State(**{name: int(found[name]) for name in names})
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {out}.") from error
    for name, value in settings.items():
        if old.get(name) != value:
            raise ValueError(
                f"{out} was written with another {name}; remove it, or use another "
                "--out."
            )
    return state, path.name == INFO_FILE


def _write(
    out: Path,
    groups: Iterator[list[tuple[int, Piece]]],
    sizes: Sequence[int],
    tokenizer: PublishedTokenizer,
    settings: dict[str, Any],
    state: _State,
    report: Callable[[Progress], Any],
) -> None:
    """Writes what is missing, and the file's header at last."""
    end_token = settings["end token"]
    largest = max(end_token, tokenizer.vocab_size - 1)
    dtype = np.dtype("<u2" if largest < 2**16 else "<u4")
    path = out / TOKENS_FILE
    with path.open("r+b" if path.exists() else "w+b") as file:
        _write_header(file, dtype, 0)
        # Behind what is known to be written, also if a killed process wrote more.
        file.seek(state.num_tokens * dtype.itemsize, os.SEEK_CUR)
        file.truncate()
        starts = np.cumsum([0, *sizes])
        for group in groups:
            texts, tokens = _encode(tokenizer, [piece for _, piece in group])
            for (_, piece), own in zip(group, tokens, strict=True):
                if piece.is_last and own[-1:] != [end_token]:
                    own.append(end_token)
                file.write(np.asarray(own, dtype).tobytes())
                state.num_tokens += len(own)
                state.num_documents += piece.is_last
            state.num_bytes += sum(len(t.encode("utf-8", "replace")) for t in texts)
            number, last = group[-1]
            inside = sum(at == number for at, _ in group)
            if number != state.num_files:
                state.num_files, state.num_pieces = number, 0
            state.num_pieces += inside
            file.flush()
            os.fsync(file.fileno())
            _save(out / PROGRESS_FILE, {"settings": settings}, state)
            done = int(starts[number]) + last.position
            report(Progress(done, int(starts[-1]), state.num_tokens))
        file.seek(0)
        _write_header(file, dtype, state.num_tokens)
        file.flush()
        os.fsync(file.fileno())


def _pieces(
    files: Sequence[Path], field: str, state: _State
) -> Iterator[tuple[int, Piece]]:
    """Yields the pieces that are not written yet, with the numbers of their files."""
    first, num_done = state.num_files, state.num_pieces
    for number in range(first, len(files)):
        for at, piece in enumerate(read_pieces(files[number], field)):
            if number > first or at >= num_done:
                yield number, piece


def _groups(
    pieces: Iterator[tuple[int, Piece]], num_characters: int
) -> Iterator[list[tuple[int, Piece]]]:
    group, size = [], 0
    for number, piece in pieces:
        group.append((number, piece))
        size += len(piece.text) if isinstance(piece.text, str) else 1000
        if size >= num_characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode(
    tokenizer: PublishedTokenizer, pieces: Sequence[Piece]
) -> tuple[list[str], list[list[int]]]:
    """The texts of pieces, and their tokens; messages by the chat template."""
    rendered = [
        (True, piece.text)
        if isinstance(piece.text, str)
        else (False, tokenizer.render(piece.text, add_generation_prompt=False))
        for piece in pieces
    ]
    tokens: list[list[int]] = []
    for is_plain, run in itertools.groupby(rendered, operator.itemgetter(0)):
        encode = tokenizer.encode_documents if is_plain else tokenizer.encode_rendered
        tokens += encode([text for _, text in run])
    return [text for _, text in rendered], tokens


def _write_header(file: IO[bytes], dtype: np.dtype, num_tokens: int) -> None:
    """Writes the header of a .npy file, whose length does not depend on the number."""
    about = {"descr": dtype.str, "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(file, about)


def _save(path: Path, about: dict[str, Any], state: _State) -> None:
    about = about | dataclasses.asdict(state)
    replace_text(path, json.dumps(about, indent=2) + "\n")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
