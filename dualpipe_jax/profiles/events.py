"""Reads the events of a Chrome trace one at a time, from a file of any size.

The standard library's JSON decoder takes one event after another from a window of the
text, so a trace of several hundred megabytes needs only as much memory as its largest
event. Both forms of the format are read: an object with `traceEvents`, and a bare
array, whose closing bracket the format lets a writer omit.

Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20
_LARGEST = 1 << 28  # no event is this large: the text is not JSON
_SPACE = " \t\r\n"


def read_events(path: Path, *, chunk_size: int = _CHUNK) -> Iterator[dict[str, Any]]:
    """Yields the events of a trace.

    Args:
      path: a .json, or a .json.gz (recognised by its first bytes, not by its name).
      chunk_size: characters to read at a time.

    Raises:
      ValueError: the file is empty, not JSON, not a trace, or truncated.
      OSError: the file cannot be read.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (
            (gzip.open if packed else open)(path, "rb") as opened,
            io.TextIOWrapper(opened, "utf-8-sig", errors="replace") as text,
        ):
            yield from _Window(path, text, chunk_size).events()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"path={str(path)!r} is a damaged gzip file ({error}); copy it again, or "
            "record the profile again."
        ) from None


class _Window:
    """The part of the text that is being decoded."""

    def __init__(self, path: Path, text: io.TextIOBase, chunk_size: int):
        self.path, self.text, self.chunk_size = path, text, chunk_size
        self.buffer, self.at = "", 0
        self.decoder = json.JSONDecoder()
        self.count = 0

    def events(self) -> Iterator[dict[str, Any]]:
        first = self.peek()
        if not first:
            raise ValueError(
                f"path={str(self.path)!r} is empty; expected a Chrome trace, as "
                "torch.profiler's export_chrome_trace and jax.profiler.trace write it."
            )
        if first == "[":
            yield from self.array(may_stay_open=True)
            return
        if first != "{":
            raise self.not_a_trace()
        found = False
        for key in self.keys():
            if key == "traceEvents" and self.peek() == "[":
                found = True
                yield from self.array()
            else:
                self.value()
        if not found:
            raise self.not_a_trace()

    def keys(self) -> Iterator[str]:
        """Yields the keys of the next object; the caller reads the values."""
        self.at += 1
        while (char := self.peek()) != "}":
            if char == ",":
                self.at += 1
                continue
            key = self.value()
            if not isinstance(key, str) or self.peek() != ":":
                raise self.not_a_trace()
            self.at += 1
            yield key

    def array(self, may_stay_open: bool = False) -> Iterator[dict[str, Any]]:
        self.at += 1
        while (char := self.peek()) != "]":
            if not char and may_stay_open:
                return
            if char == ",":
                self.at += 1
                continue
            event = self.value()
            self.count += 1
            if not isinstance(event, dict):
                raise self.not_a_trace()
            yield event
        self.at += 1

    def peek(self) -> str:
        """Returns the next character that is not a space; empty at the end."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in _SPACE:
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self) -> Any:
        """Decodes the next value, reading on until the window contains all of it."""
        if not self.peek():
            raise self.broken()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError:
                self.extend()
                continue
            except (RecursionError, ValueError):  # too deep, or digits by the thousand
                raise self.broken() from None
            # A number that ends with the window may continue behind it.
            if end == len(self.buffer) and self.more():
                continue
            self.at = end
            return value

    def extend(self) -> None:
        """Doubles the text being decoded, so that each byte is decoded about twice."""
        wanted = size = max(self.chunk_size, len(self.buffer) - self.at)
        while wanted > 0 and (got := self.more()):
            wanted -= got
        if wanted == size or size > _LARGEST:
            raise self.broken()

    def more(self) -> int:
        """Reads on; returns the number of characters read, 0 at the end."""
        got = self.text.read(self.chunk_size)
        self.buffer = self.buffer[self.at :] + got
        self.at = 0
        return len(got)

    def not_a_trace(self) -> ValueError:
        return ValueError(
            f"path={str(self.path)!r} is not a Chrome trace; expected a JSON object "
            "with a list `traceEvents`, or a JSON list of events."
        )

    def broken(self) -> ValueError:
        return ValueError(
            f"path={str(self.path)!r} ends too early, or is damaged, behind "
            f"{self.count} events; copy it again, or record the profile again and let "
            "the profiler finish."
        )
