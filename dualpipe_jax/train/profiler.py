"""Profiles a few steps of a training run, which continues if that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from dualpipe_jax.profiles import profile

_WARM_UP = 2  # steps that are left out: the first ones fill caches and pools


class StepProfiler:
    """Starts and stops the profiler around some of a run's steps.

    Args:
      folder: gets the profile.
      num_steps: how many; 0 profiles nothing.
      first: the run's next step.
      last: the run's last step.
      compiled: the programs that a step runs.
      say: called with a line of text if there is no profile.
    """

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        first: int,
        last: int,
        compiled: Sequence[Any],
        say: Callable[[str], object],
    ):
        self._folder, self._compiled, self._say = folder, compiled, say
        start = max(first, min(first + _WARM_UP, last - num_steps + 1))
        self._steps = range(start, min(start + num_steps, last + 1))
        self._running = contextlib.ExitStack()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around a step: profiles it if it is one of those."""
        if step in self._steps and step == self._steps[0]:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step in self._steps and step == self._steps[-1]:
            self._stop()

    def _start(self) -> None:
        try:
            self._running.enter_context(profile(self._folder, *self._compiled))
        except Exception as error:  # a full disk, or another profiler that runs
            self._say(f"no profile is taken: {error}")

    def _stop(self) -> None:
        try:
            self._running.close()
        except Exception as error:
            self._say(f"the profile was not written: {error}")
