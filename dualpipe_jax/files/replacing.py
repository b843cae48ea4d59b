"""Files of a run's folder that are replaced as a whole."""

from __future__ import annotations

import contextlib
import glob
import os
from pathlib import Path

_ASIDE = ".new"


def remove_unfinished(path: Path) -> None:
    """Removes what processes left that were killed in `replace_text`."""
    for aside in path.parent.glob(f"{glob.escape(path.name)}.*{_ASIDE}"):
        with contextlib.suppress(OSError):
            aside.unlink()


def replace_text(path: Path, text: str) -> None:
    """Replaces a file, whose readers see the old text or the new one, never a part.

    Raises:
      OSError: it cannot be written; the old text is still there.

    Examples:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "run.json"
      >>> replace_text(path, "{}")
      >>> path.read_text(), len(list(path.parent.iterdir()))
      ('{}', 1)
    """
    # Another process, such as the `report` command, may write it at the same time.
    aside = path.with_name(f"{path.name}.{os.getpid()}{_ASIDE}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
