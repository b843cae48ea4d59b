"""A lock on a run's folder, so that two runs never write into one."""

from __future__ import annotations

import datetime
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

FILE = ".lock"


class Lock:
    """Held by the one process that writes into a folder.

    The operating system ends it with the process, also after a kill. The file, which
    stays, tells others which process holds it; where files cannot be locked, this
    decides: on the same host, a process that is alive holds it.

    Args:
      folder: of a run.

    Examples:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> first, second = Lock(folder), Lock(folder)
      >>> first.acquire() is None, second.acquire()
      (True, 'process ... on ... since ...')
      >>> first.release()
      >>> second.acquire() is None
      True
      >>> second.release()
    """

    def __init__(self, folder: Path):
        self._path = folder / FILE
        self._file: IO[str] | None = None

    def acquire(self) -> str | None:
        """Takes the lock; or returns who holds it."""
        file = self._path.open("a+", encoding="utf-8")
        try:
            is_free = _lock(file)
            file.seek(0)
            holder = _read(file)
            if is_free is None:
                is_free = not _is_alive(holder)
            if not is_free:
                return (
                    f"process {holder.get('pid')} on {holder.get('host')} since "
                    f"{holder.get('since')}"
                )
            now = datetime.datetime.now(datetime.UTC)
            mine = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": f"{now:%Y-%m-%d %H:%M:%S} UTC",
            }
            file.truncate(0)
            file.write(json.dumps(mine) + "\n")
            file.flush()
            self._file, file = file, None
        finally:
            if file is not None:
                file.close()
        return None

    def release(self) -> None:
        """Gives it back, if it was taken."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def _lock(file: IO[str]) -> bool | None:
    """Locks a file unless it is locked: whether it was free; None: it cannot be."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # some network file systems
        return None
    return True


def _read(file: IO[str]) -> dict[str, Any]:
    try:
        found = json.loads(file.read())
    except ValueError:  # empty, or being written
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a process of this host is alive; one of another cannot be asked."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
