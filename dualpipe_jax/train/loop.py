"""The training loop: data, the jitted step, metrics, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dualpipe_jax import pictures
from dualpipe_jax.lowering import lower
from dualpipe_jax.schedules import simulate
from dualpipe_jax.train import data, distributed
from dualpipe_jax.train.checkpoint import Checkpoints
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.metrics import MetricsLog, draw_loss, read_metrics
from dualpipe_jax.train.profiler import StepProfiler
from dualpipe_jax.train.progress import TrainProgress
from dualpipe_jax.train.report import LiveReport
from dualpipe_jax.train.state import TrainState
from dualpipe_jax.train.step import Programs, make_programs

# What a run writes into its folder, and nothing else there is ever touched.
ARTEFACTS = (
    "config.json",
    "metrics.jsonl",
    "schedule.svg",
    "schedule.png",
    "loss.png",
    "sample.txt",
    "run.json",
    "report.html",
    "profile",
    "overlap.json",
    "checkpoints",
)
PROMPT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: optimizer steps done, over all resumptions.
      metrics: the records of metrics.jsonl.
      stopped_by: the signal that ended it early, such as `"SIGTERM"`, or None.
      compile_s: seconds that compiling took.
      train_s: seconds of this call's steps, evaluations and checkpoints.
      save_failure: why the last checkpoint could not be written, or None.
      sample: a prompt of held-out text and what the model makes of it, or None.
    """

    step: int
    metrics: list[dict[str, Any]]
    stopped_by: str | None
    compile_s: float
    train_s: float
    save_failure: str | None = None
    sample: tuple[str, str] | None = None

    @property
    def held_out_loss(self) -> float | None:
        losses = [r["held_out_loss"] for r in self.metrics if "held_out_loss" in r]
        return losses[-1] if losses else None


def train(
    config: TrainConfig,
    text: data.Text,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    console: Console | None = None,
    profile_steps: int = 0,
) -> Result:
    """Trains until `config.num_steps`, or until SIGTERM or Ctrl-C; saves either way.

    Several processes (see `distributed.connect`) make the same call. Process 0
    writes and prints; all of them read and write checkpoints; a signal that reaches
    one stops all of them at the same step.

    Args:
      config: the run.
      text: what to train on; see `load_text`.
      folder: gets config.json, metrics.jsonl, pictures and checkpoints. An earlier
        run's files there are moved into a subfolder, unless it is resumed.
      resume: continue from the folder's latest checkpoint that is whole.
      console: where progress is shown.
      profile_steps: profile so many steps into the folder's `profile`, the first two
        left out; `read_trace` reads it.

    Raises:
      ValueError: `profile_steps` is negative, the config fits neither the devices
        nor the model, or there is nothing to resume from; before anything is compiled.
      FloatingPointError: the loss is not finite any more.
    """
    if profile_steps < 0:
        raise ValueError(f"{profile_steps=} must be >= 0; 0 profiles nothing.")
    console, folder = console or Console(stderr=True), Path(folder)
    programs = make_programs(config)
    # All of a large file would take long to look at; each batch is checked too.
    for tokens in (text.held_out, text.train[:10_000_000]):
        programs.check_tokens(tokens)
    main = distributed.is_main()
    if not main:
        console = Console(quiet=True)
    _prepare(folder, resume, console)
    with Checkpoints(folder / "checkpoints", console.print) as checkpoints:
        state, position = None, 0
        if resume:
            state, position = _restore(programs, checkpoints)
        # The lowered program at structural costs: virtual devices that share a few
        # cores cannot show their bubble by a clock.
        timeline = simulate(lower(programs.schedule))
        if programs.description:
            console.print(programs.description)
        if main:
            (folder / "config.json").write_text(config.to_json() + "\n")
            for suffix in ("svg", "png"):
                pictures.save(timeline, folder / f"schedule.{suffix}")

        with _stop_signals() as received:
            started = time.perf_counter()
            with console.status("compiling"):
                programs = programs.compile()
                if state is None:
                    state = programs.init()
            compile_s = time.perf_counter() - started
            console.print(
                f"{config.name}: {programs.schedule.kind} on "
                f"{' x '.join(f'{a}={n}' for a, n in config.mesh.items())}, "
                f"{text.source}; compiled in {compile_s:.0f} s"
            )
            started = time.perf_counter()
            step, stopped_by = int(state.step), None
            log = MetricsLog(folder / "metrics.jsonl", step) if main else None
            report = None
            if main:
                report = LiveReport(folder, _facts(config, programs, text, compile_s))
            with (
                log or contextlib.nullcontext(),
                report or contextlib.nullcontext(),
                TrainProgress(console, config.num_steps, step) as progress,
                StepProfiler(
                    folder / "profile",
                    profile_steps if main else 0,
                    first=step + 1,
                    last=config.num_steps,
                    compiled=[programs.compiled] if programs.compiled else [],
                    say=console.print,
                ) as profiler,
            ):
                steps = _steps(config, programs, state, position, text, profiler)
                for state, position, record in steps:
                    step = record["step"]
                    record["pipeline_bubble_ratio"] = timeline.bubble_ratio
                    if log:
                        log.write(record)
                    if report:
                        report.update()
                    progress.update(record)
                    checkpoints.poll()
                    if step % config.checkpoint_every == 0:
                        _save(checkpoints, programs, state, position)
                    stopped_by = distributed.first_said(next(iter(received), None))
                    if stopped_by:
                        break
            _save(checkpoints, programs, state, position)
            checkpoints.wait()
    train_s = time.perf_counter() - started
    sample = None
    if programs.sample is not None and not stopped_by:
        sample = _sample(config, programs, state, text)
    metrics = []
    if main:
        metrics = read_metrics(folder / "metrics.jsonl")
        try:
            draw_loss(metrics, folder / "loss.png", unit=text.unit)
            if sample is not None:
                (folder / "sample.txt").write_text("".join(sample))
        except OSError as error:  # a full disk must not end a run that is done
            console.print(f"not everything could be written: {error}")
    if report:
        ended = f"stopped by {stopped_by}; --resume continues" if stopped_by else "done"
        report.finish(ended)
        if report.failure:
            console.print(f"the report could not be written: {report.failure}")
    return Result(
        step=step,
        metrics=metrics,
        stopped_by=stopped_by,
        compile_s=compile_s,
        train_s=train_s,
        save_failure=checkpoints.failure,
        sample=sample,
    )


def _facts(
    config: TrainConfig, programs: Programs, text: data.Text, compile_s: float
) -> dict[str, Any]:
    """What run.json says of a run beside its config."""
    device, number = programs.mesh.devices.flat[0], config.num_devices
    names = ("jax", "jaxlib", "flax", "optax")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "compile_s": compile_s,
        "devices": f"{number} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "data": text.source,
        "unit": text.unit,
        "model": programs.description,
        "versions": {"python": platform.python_version(), **versions},
    }


def _steps(
    config: TrainConfig,
    programs: Programs,
    state: TrainState,
    position: int,
    text: data.Text,
    profiler: StepProfiler,
) -> Iterator[tuple[TrainState, int, dict[str, Any]]]:
    """Yields, after each step left: state, sequences seen, what the step measured."""
    shape = (config.num_microbatches, config.microbatch_size)
    held_out = data.held_out_batch(text.held_out, shape, config.sequence_length)
    for step in range(int(state.step) + 1, config.num_steps + 1):
        started = time.perf_counter()
        batch = data.train_batch(
            text.train,
            shape,
            config.sequence_length,
            seed=config.seed,
            position=position,
        )
        with profiler.around(step):
            state, metrics = programs.train_step(state, *batch)
            record: dict[str, Any] = {"step": step}
            record |= {k: _plain(v) for k, v in metrics.items()}
        position += math.prod(shape)
        seconds = time.perf_counter() - started
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"loss={record['loss']} at {step=}; lower the learning rate, or resume "
                "from the last checkpoint with other data."
            )
        record["tokens_per_s"] = config.tokens_per_step / seconds
        if step % config.eval_every == 0 or step == config.num_steps:
            loss = programs.held_out_loss(state, *held_out)
            record["held_out_loss"] = float(loss)
        yield state, position, record


def _plain(value: Any) -> float | list[float]:
    """A metric for JSON; of those of many layers, four decimals are plenty."""
    array = np.asarray(value)
    return array.astype(float).round(4).tolist() if array.ndim else float(array)


def _save(
    checkpoints: Checkpoints, programs: Programs, state: TrainState, position: int
) -> None:
    info = {"position": position, **programs.checkpoint_info}
    checkpoints.save(int(state.step), state, info)


def _restore(programs: Programs, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    def plan(info: dict[str, Any]):
        return programs.restore_plan({k: v for k, v in info.items() if k != "position"})

    _, state, info = checkpoints.restore(plan)
    return state, info["position"]


def _sample(
    config: TrainConfig, programs: Programs, state: TrainState, text: data.Text
) -> tuple[str, str]:
    """A prompt of held-out text, and what the model continues it with, as text."""
    assert programs.sample is not None
    length = min(PROMPT_TOKENS, max(1, config.sequence_length // 2))
    prompt = np.asarray(text.held_out[:length], np.int32)
    new = np.asarray(programs.sample(state, prompt))

    def as_text(tokens: np.ndarray) -> str:
        if text.unit == "byte":
            return bytes(tokens.astype(np.uint8)).decode(errors="replace")
        return " ".join(map(str, tokens.tolist())) + " "

    return as_text(prompt), as_text(new)


def _prepare(folder: Path, resume: bool, console: Console) -> None:
    """Makes the run's folder, and makes sure that all processes see it."""
    checkpoints, problem = folder / "checkpoints", None
    if resume and not checkpoints.is_dir():
        problem = f"no checkpoint in {folder}; start a run there without --resume."
    elif distributed.is_main():
        if not resume:
            _move_earlier_run(folder, console)
        checkpoints.mkdir(parents=True, exist_ok=True)
    problem = distributed.first_said(problem)
    if problem is None and not checkpoints.is_dir():
        problem = (
            f"{folder} is not seen by every process; use an --out on a file system "
            "that all of them share."
        )
    if problem := distributed.first_said(problem):
        raise ValueError(problem)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Collects SIGTERM and SIGINT in a list; a second one acts as it always does."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python allows handlers in the main thread only.
        return
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.getsignal(name) for name in names}

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    def receive(number: int, _) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for name in names:
        signal.signal(name, receive)
    try:
        yield received
    finally:
        restore()


def _move_earlier_run(folder: Path, console: Console) -> None:
    found = [folder / name for name in ARTEFACTS if (folder / name).exists()]
    if not (folder / "config.json").exists():
        return
    number = 1
    while (aside := folder / f"previous-{number}").exists():
        number += 1
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    console.print(f"the earlier run's files are now in {aside}")
