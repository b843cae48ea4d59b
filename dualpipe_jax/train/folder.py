"""A run's folder: whether a run begins there or continues, and what is moved aside.

Process 0 looks and decides; the others are told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dualpipe_jax.files import Lock, remove_unfinished
from dualpipe_jax.processes import distributed

# What `launch` has met: a line of JSON for each time that it started the run again.
LAUNCHES = "launches.jsonl"
# The folder of the tokenizer that its tokens are of, if they have one.
TOKENIZER = "tokenizer"
# What a run writes into its folder; nothing else there is ever touched. In the order
# in which they are moved aside: after a kill in between, no run continues from what is
# left, and run.json still tells that it is left of an earlier run.
ARTEFACTS = (
    "checkpoints",
    "metrics.jsonl",
    "schedule.svg",
    "schedule.png",
    "loss.png",
    "sample.txt",
    TOKENIZER,
    "report.html",
    "profile",
    "overlap.json",
    LAUNCHES,
    "config.json",
    "run.json",
)
# How run.json describes a run that came to its end; it has written a checkpoint.
DONE, STOPPED = "done", "stopped by"
Resume = bool | Literal["must"]


def prepare(
    folder: Path, lock: Lock, resume: Resume, say: Callable[[str], Any]
) -> bool:
    """Makes and locks the folder, and decides whether the run continues there.

    An earlier run's files in it are moved into a subfolder if this run begins, except
    for those of a run that was killed before its first checkpoint and resumes.

    Args:
      folder: the run's.
      lock: of the folder; process 0 takes it.
      resume: see `train`.
      say: called with a line of text.

    Returns:
      Whether there is a checkpoint to continue from.

    Raises:
      ValueError: `resume` is unknown, there must be a checkpoint and is none, another
        run is in the folder, or some process does not see it.
    """
    if resume not in (False, True, "must"):
        raise ValueError(f"{resume=} must be False, True or 'must'.")
    checkpoints = folder / "checkpoints"
    choice = problem = None
    if distributed.is_main():
        has_checkpoint = newest_checkpoint(folder) is not None
        if resume == "must" and not has_checkpoint:
            problem = (
                f"no checkpoint in {folder}; start a run there without --resume=must."
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            if holder := lock.acquire():
                problem = (
                    f"{folder} is in use by another run ({holder}); end that one, or "
                    "use another --out."
                )
        if problem is None:
            for name in ARTEFACTS:
                remove_unfinished(folder / name)
            choice = "continue" if resume and has_checkpoint else "begin"
            if choice == "begin":
                _begin(folder, bool(resume), say)
            checkpoints.mkdir(parents=True, exist_ok=True)
    problem = distributed.first_text(problem)
    choice = distributed.first_text(choice)
    if problem is None and not checkpoints.is_dir():
        problem = (
            f"{folder} is not seen by every process; use an --out on a file system "
            "that all of them share."
        )
    if problem := distributed.first_text(problem):
        raise ValueError(problem)
    return choice == "continue"


def newest_checkpoint(folder: Path) -> int | None:
    """The step of a run's last checkpoint, or None; of those that are being written,
    which have a longer name, none counts.
    """
    try:
        names = [path.name for path in (folder / "checkpoints").iterdir()]
    except OSError:
        return None
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _begin(folder: Path, resume: bool, say: Callable[[str], Any]) -> None:
    """Moves an earlier run's files aside, all of them in the end."""
    if resume:
        say(f"no checkpoint in {folder} yet: the run begins")
        if not _has_ended(folder):
            return
    found = [name for name in ARTEFACTS if _holds_something(folder / name)]
    if not found:
        return
    number = 1
    # A kill may have left the last one incomplete.
    while any(
        (aside := folder / f"previous-{number}").joinpath(name).exists()
        for name in (*found, ARTEFACTS[-1])
    ):
        number += 1
    aside.mkdir(exist_ok=True)
    for name in found:
        (folder / name).rename(aside / name)
    say(f"the earlier run's files are now in {aside}")


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _has_ended(folder: Path) -> bool:
    """Whether a run ended there, so that its record is of value without checkpoints."""
    try:
        state = json.loads((folder / "run.json").read_text())["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return str(state).startswith((DONE, STOPPED))
