"""Documents in files of text, JSON lines and Parquet, in pieces of about a megabyte."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

Messages = list[dict[str, str]]

PIECE_CHARACTERS = 2**20
# Where a document is cut: no token of the usual tokenizers goes over the end of a line
# that text follows.
_LINE_END = re.compile(r"\n(?=\S)")
_SPACE = re.compile(r"\S(?= \S)")
_JSON = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_PARQUET = ".parquet"


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
      text: the part; or messages, which a chat template makes text of.
      is_last: whether the document ends with it.
      position: bytes of the file that are read, of its size.
    """

    text: str | Messages
    is_last: bool
    position: int


def read_pieces(path: Path, field: str) -> Iterator[Piece]:
    """Yields the documents of a file.

    A file of JSON lines (`.jsonl`, also with `.gz`) or Parquet has a document in each
    line or row. Any other file is one document. Documents without text are left out.

    Args:
      path: the file.
      field: name of the text in JSON lines and Parquet. Its value may also be a list
        of messages.

    Raises:
      ImportError: Parquet needs pyarrow.
      ValueError: a line is not JSON, or the field is missing or not text.
    """
    name = path.name.lower()
    if name.endswith(_PARQUET):
        found = _parquet(path, field)
    elif name.endswith(_JSON):
        found = _json_lines(path, field)
    else:
        yield from _text(path)
        return
    for value, position in found:
        if not isinstance(value, str):
            yield Piece(value, True, position)
            continue
        start = 0
        while len(value) - start > 2 * PIECE_CHARACTERS:
            end = _end_of_piece(value, start)
            yield Piece(value[start:end], False, position)
            start = end
        if value:
            yield Piece(value[start:], True, position)


def _end_of_piece(text: str, start: int) -> int:
    """Where the piece from `start` ends; the text is two megabytes longer than that."""
    first, last = start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
    for pattern in (_LINE_END, _SPACE):
        if found := pattern.search(text, first, last):
            return found.end()
    return last


def _text(path: Path) -> Iterator[Piece]:
    with path.open("rb") as raw, _decoded(raw) as file:
        rest = ""
        while more := file.read(PIECE_CHARACTERS):
            rest += more
            if len(rest) > 2 * PIECE_CHARACTERS:
                end = _end_of_piece(rest, 0)
                yield Piece(rest[:end], False, raw.tell())
                rest = rest[end:]
        if rest:
            yield Piece(rest, True, raw.tell())


def _json_lines(path: Path, field: str) -> Iterator[tuple[str | Messages, int]]:
    with contextlib.ExitStack() as stack:
        raw: IO[bytes] = stack.enter_context(path.open("rb"))
        opened: Any = raw
        if path.suffix.lower() == ".gz":
            opened = stack.enter_context(gzip.GzipFile(fileobj=raw))
        lines = enumerate(stack.enter_context(_decoded(opened)), 1)
        try:
            for number, line in lines:
                if not line.strip():
                    continue
                value = _value_of(line, field, f"{path}, line {number}")
                if value:
                    yield value, raw.tell()
        except (OSError, EOFError) as error:  # of gzip
            raise ValueError(f"{path} cannot be read ({error}).") from error


def _value_of(line: str, field: str, where: str) -> str | Messages:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}).") from error
    if not isinstance(found, dict) or field not in found:
        names = ", ".join(found) if isinstance(found, dict) else ""
        raise ValueError(
            f"{where} has no field {field!r}"
            + (f", but {names}; name one with --field." if names else ".")
        )
    return _checked(found[field], field, where)


def _checked(value: Any, field: str, where: str) -> str | Messages:
    is_messages = isinstance(value, list) and all(isinstance(m, dict) for m in value)
    if isinstance(value, str) or is_messages:
        return value
    if value is None:
        return ""
    raise ValueError(
        f"{where}: {field} is {str(value)[:40]!r}; it must be text or messages."
    )


def _parquet(path: Path, field: str) -> Iterator[tuple[str | Messages, int]]:
    import pyarrow
    import pyarrow.parquet

    size, num_done = path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(
                    f"{path} has no column {field!r}, but {', '.join(names)}; name "
                    "one with --field."
                )
            num_rows = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    num_done += 1
                    value = _checked(value, field, f"{path}, row {num_done}")
                    if value:
                        yield value, size * num_done // num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}).") from error


def _decoded(raw: Any) -> io.TextIOWrapper:
    # Line ends stay as they are; what is not UTF-8 becomes U+FFFD.
    return io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline="\n")
