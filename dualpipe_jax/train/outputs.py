"""What a run leaves in its folder and shows on the console."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from dualpipe_jax import pictures
from dualpipe_jax.files import Lock, replace_text
from dualpipe_jax.lowering import lower
from dualpipe_jax.processes import Watch, distributed
from dualpipe_jax.schedules import simulate
from dualpipe_jax.train.checkpoint import Checkpoints
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.data import Text
from dualpipe_jax.train.data_order import data_order, differences
from dualpipe_jax.train.folder import DONE, STOPPED, TOKENIZER, Resume, prepare
from dualpipe_jax.train.metrics import MetricsLog, draw_loss
from dualpipe_jax.train.profiler import StepProfiler
from dualpipe_jax.train.programs import Programs
from dualpipe_jax.train.progress import TrainProgress
from dualpipe_jax.train.report import LiveReport
from dualpipe_jax.train.state import TrainState

Record = dict[str, Any]


class RunOutputs:
    """A run's folder, checkpoints, metrics, report and progress; a context manager.

    All processes of a run make the same calls. Checkpoints are written by all of
    them, everything else by process 0.

    Args:
      folder: see `folder.prepare`.
      console: where progress is shown.
      config: the run.
      programs: not compiled yet.
      text: what the run trains on.
      resume: see `train`.

    Raises:
      ValueError: see `folder.prepare`.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        config: TrainConfig,
        programs: Programs,
        text: Text,
        *,
        resume: Resume,
    ):
        self._folder, self._console = folder, console
        self._config, self._programs, self._text = config, programs, text
        self._order = data_order(config, text)
        # The lowered program at structural costs: virtual devices that share a few
        # cores cannot show their bubble by a clock.
        self._timeline = simulate(lower(programs.schedule))
        self._log: MetricsLog | None = None
        self._report: LiveReport | None = None
        with contextlib.ExitStack() as stack:
            lock = Lock(folder)
            stack.callback(lock.release)
            self._continues = prepare(folder, lock, resume, console.print)
            self._checkpoints = stack.enter_context(
                Checkpoints(folder / "checkpoints", console.print)
            )
            self._held = stack.pop_all()

    def __enter__(self) -> RunOutputs:
        return self

    def __exit__(self, *error) -> None:
        self._held.__exit__(*error)

    @property
    def save_failure(self) -> str | None:
        """Why the last checkpoint could not be written, or None."""
        return self._checkpoints.failure

    def restore(self) -> tuple[TrainState | None, int]:
        """The state of the latest checkpoint, and how many sequences it has seen.

        None, and 0, for a run that begins.
        """
        if not self._continues:
            return None, 0

        def plan(info: dict[str, Any]):
            own = ("position", "order")
            info = {name: each for name, each in info.items() if name not in own}
            return self._programs.restore_plan(info)

        step, state, info = self._checkpoints.restore(plan)
        line = f"the run continues after {step=}"
        if found := differences(info.get("order", self._order), self._order):
            line += f" with {'; '.join(found)}: the data comes in another order now"
        if step >= self._config.num_steps:
            line += f"; num_steps={self._config.num_steps} leaves nothing to do"
        self._console.print(line, markup=False)
        return state, info["position"]

    def save(self, state: TrainState, position: int, *, wait: bool = False) -> None:
        """Starts to write a checkpoint; `wait` until it is written, or has failed."""
        info = {
            "position": position,
            "order": self._order,
            **self._programs.checkpoint_info,
        }
        self._checkpoints.save(int(state.step), state, info)
        if wait:
            self._checkpoints.wait()

    def describe(self) -> None:
        """Prints how the model is laid out; writes the config and the schedule."""
        if self._programs.description:
            self._console.print(self._programs.description)
        if distributed.is_main():
            replace_text(self._folder / "config.json", self._config.to_json() + "\n")
            self._text.tokenizer.save(self._folder / TOKENIZER)
            for suffix in ("svg", "png"):
                pictures.save(self._timeline, self._folder / f"schedule.{suffix}")

    @contextlib.contextmanager
    def recording(
        self, step: int, compile_s: float, watch: Watch
    ) -> Iterator[Callable]:
        """Around the steps: yields a function that takes each step's metrics.

        Args:
          step: steps done already.
          compile_s: seconds that compiling took.
          watch: calls for the report's last words if a process is lost.
        """
        config = self._config
        with contextlib.ExitStack() as stack:
            if distributed.is_main():
                self._log = MetricsLog(self._folder / "metrics.jsonl", step)
                self._report = LiveReport(self._folder, self._facts(compile_s))
                stack.enter_context(self._log)
                stack.enter_context(self._report)
                stack.enter_context(watch.reporting(self._report.finish))
                if gap := self._log.gap:
                    self._console.print(f"metrics.jsonl has no record of step {gap}")
            progress = TrainProgress(self._console, config.num_steps, step)
            stack.enter_context(progress)

            def record(metrics: Record) -> None:
                ratio = self._timeline.bubble_ratio
                metrics = metrics | {"pipeline_bubble_ratio": ratio}
                if self._log is not None and self._report is not None:
                    self._write(self._log, metrics)
                    self._report.update()
                progress.update(metrics)
                self._checkpoints.poll()

            yield record

    def _write(self, log: MetricsLog, metrics: Record) -> None:
        """Writes a record; says once for each time that it cannot."""
        failed_before = log.failure is not None
        log.write(metrics)
        if log.failure and not failed_before:
            self._console.print(
                f"metrics.jsonl could not be written ({log.failure}); training "
                "continues, and its records are written when there is room"
            )

    def profiler(self, num_steps: int, first: int, compiled: Any) -> StepProfiler:
        """Profiles some of the steps from `first` on, in process 0."""
        return StepProfiler(
            self._folder / "profile",
            num_steps if distributed.is_main() else 0,
            first=first,
            last=self._config.num_steps,
            compiled=[] if compiled is None else [compiled],
            say=self._console.print,
        )

    @property
    def num_unwritten(self) -> int:
        """How many records could not be written to metrics.jsonl."""
        return 0 if self._log is None else self._log.num_unwritten

    def finish(
        self, sample: tuple[str, str] | None, stopped_by: str | None
    ) -> list[Record]:
        """Writes what a run ends with.

        Args:
          sample: a prompt and its continuation, or None.
          stopped_by: the signal that ended the run early, or None.

        Returns:
          The records of all steps; none in processes other than process 0.
        """
        if self._report is None or self._log is None:
            return []
        metrics = self._log.records()
        try:
            draw_loss(metrics, self._folder / "loss.png", unit=self._text.unit)
            if sample is not None:
                (self._folder / "sample.txt").write_text("".join(sample))
        except OSError as error:  # a full disk must not end a run that is done
            self._console.print(f"not everything could be written: {error}")
        ended = f"{STOPPED} {stopped_by}; --resume continues" if stopped_by else DONE
        self._report.finish(ended)
        if failure := self._report.failure:
            self._console.print(f"the report could not be written: {failure}")
        return metrics

    def _facts(self, compile_s: float) -> dict[str, Any]:
        """What run.json holds beside the config."""
        device = self._programs.mesh.devices.flat[0]
        names = ("jax", "jaxlib", "flax", "optax")
        versions = {name: importlib.metadata.version(name) for name in names}
        number = self._config.num_devices
        return {
            "compile_s": compile_s,
            "devices": f"{number} x {device.device_kind} ({device.platform})",
            "processes": jax.process_count(),
            "data": self._text.source,
            "unit": self._text.unit,
            "model": self._programs.description,
            "versions": {"python": platform.python_version(), **versions},
        }
