"""The persistent cache of compiled programs that `train` and `serve` use by default.

jax finds and writes the entries. This module chooses the folder, limits its size, and
sees to it that an entry which cannot be read or written costs a line on the console,
never the run.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import re
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from dualpipe_jax import compat
from dualpipe_jax.processes import distributed

# Of all entries in the default folder; those of `configs/tiny.py` take 5 MB.
MAX_BYTES = 2 * 2**30
_FAILURE = re.compile(
    r"Error (?P<what>reading|writing) persistent compilation cache entry for "
    r"'(?P<program>[^']*)': (?P<why>.*)",
    re.DOTALL,
)


@contextlib.contextmanager
def compilation_cache(
    say: Callable[[str], Any], *, enabled: bool = True
) -> Iterator[None]:
    """Keeps programs that compile in the block, and uses those that were kept.

    A cache that is configured already, as by JAX_COMPILATION_CACHE_DIR, is used as it
    is. Otherwise all programs are kept in `default_folder()`. A run of several
    processes has no default: it needs a folder that all of them see.

    Args:
      say: called with a line of text when entries cannot be read or written.
      enabled: False compiles everything, and keeps nothing.
    """
    settings: dict[str, Any] = {}
    folder = None
    if not enabled:
        settings["jax_enable_compilation_cache"] = False
    elif _is_unconfigured() and distributed.num_processes() == 1:
        folder = prepare_folder("", say)
        if folder is not None:
            settings["jax_compilation_cache_dir"] = str(folder)
            # Small programs too: a run has dozens of them.
            settings["jax_persistent_cache_min_compile_time_secs"] = 0.0
    with (
        compat.cache_settings(settings),
        _keys_of_main(),
        _failures_as_lines(say, folder),
    ):
        yield


@contextlib.contextmanager
def _keys_of_main() -> Iterator[None]:
    """Finds what process 0 writes, where it is on the same machine."""
    if distributed.num_processes() == 1:
        yield
        return
    here = socket.gethostname()

    @functools.cache
    def choose(own: int) -> int:
        # Another machine's CPU may lack instructions.
        found = distributed.text_of_main("topology", f"{own} {here}") or ""
        topology, _, there = found.partition(" ")
        return int(topology) if there == here else own

    with compat.cache_keys_for_topology(choose):
        yield


def for_children(say: Callable[[str], Any]) -> dict[str, str]:
    """The environment in which several processes of this machine share the cache."""
    folder = prepare_folder("", say) if _is_unconfigured() else None
    if folder is None:
        return {}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def default_folder() -> Path:
    """This package's folder among the user's caches.

    Raises:
      RuntimeError: the user has no home.
    """
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dualpipe_jax"
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # as its specification asks
        caches = Path.home() / ".cache"
    return caches / "dualpipe_jax"


def prune(folder: Path, max_bytes: int) -> None:
    """Deletes the entries that were used longest ago, until the others fit.

    jax's own limit (`jax_compilation_cache_max_size`) needs the package filelock, and
    after a kill between the two files of an entry it can write no other (jax 0.10.2).
    """
    entries = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes, too
            stat = path.stat()
            entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    excess = sum(size for _, size, _ in entries) - max_bytes
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _is_unconfigured() -> bool:
    values = jax.config.values
    return values["jax_enable_compilation_cache"] and (
        values["jax_compilation_cache_dir"] is None
    )


def prepare_folder(name: str, say: Callable[[str], Any]) -> Path | None:
    """Makes a folder for compiled programs, with room for more.

    Args:
      name: of a folder within `default_folder()`; "" is that folder.
      say: called with a line of text if the folder cannot be written to.

    Returns:
      The folder, or None if it cannot be written to.
    """
    try:
        folder = default_folder() / name
        # For this user only: jax runs the code that it finds there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        prune(folder, MAX_BYTES)
    except (OSError, RuntimeError) as error:
        say(
            f"compiled programs are not kept ({error}); set JAX_COMPILATION_CACHE_DIR "
            "to a folder that can be written to"
        )
        return None
    return folder


@contextlib.contextmanager
def _failures_as_lines(
    say: Callable[[str], Any], folder: Path | None
) -> Iterator[None]:
    """Turns jax's warnings into one line per kind, and removes damaged entries.

    Args:
      say: see `compilation_cache`.
      folder: where entries may be deleted, or None.
    """
    reported: set[str] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "Error (reading|writing) persistent comp")
        show = warnings.showwarning

        def show_or_say(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            failure = _FAILURE.match(str(message))
            if failure is None:
                show(message, *args, **kwargs)
                return
            if folder is not None:
                _remove_entries(folder, failure["program"])
            if failure["what"] not in reported:
                reported.add(failure["what"])
                say(_line(failure))

        warnings.showwarning = show_or_say
        yield


def _line(failure: re.Match[str]) -> str:
    why = failure["why"].partition("\n")[0][:200]
    if failure["what"] == "reading":
        return f"a program in the compilation cache cannot be read: {why}"
    return f"compiled programs cannot be kept: {why}"


def _remove_entries(folder: Path, program: str) -> None:
    """Removes all entries of a program's name; jax's warnings name no single one.

    jax would neither load nor replace an entry that a kill or a full disk cut off.
    """
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{glob.escape(program)}-*-cache"):
            path.unlink(missing_ok=True)
