"""The training loop: data, the jitted step, metrics, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from dualpipe_jax import show
from dualpipe_jax.lowering import lower
from dualpipe_jax.simulator import simulate
from dualpipe_jax.train import data
from dualpipe_jax.train.checkpoint import Checkpoints
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.metrics import MetricsLog, draw_loss, read_metrics
from dualpipe_jax.train.progress import TrainProgress
from dualpipe_jax.train.step import Programs, TrainState, make_programs

# What a run writes into its folder, and nothing else there is ever touched.
ARTEFACTS = (
    "config.json",
    "metrics.jsonl",
    "schedule.svg",
    "schedule.png",
    "loss.png",
    "checkpoints",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: optimizer steps done, over all resumptions.
      metrics: the records of metrics.jsonl.
      stopped_by: the signal that ended it early, such as `"SIGTERM"`, or None.
      compile_s: seconds that compiling took.
      train_s: seconds of this call's steps, evaluations and checkpoints.
    """

    step: int
    metrics: list[dict[str, Any]]
    stopped_by: str | None
    compile_s: float
    train_s: float

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
) -> Result:
    """Trains until `config.num_steps`, or until SIGTERM or Ctrl-C; saves either way.

    Args:
      config: the run.
      text: what to train on; see `load_text`.
      folder: gets config.json, metrics.jsonl, pictures and checkpoints. An earlier
        run's files there are moved into a subfolder, unless it is resumed.
      resume: continue from the folder's latest checkpoint.
      console: where progress is shown.

    Raises:
      ValueError: the config fits neither the devices nor the model, or there is
        nothing to resume from; before anything is compiled.
      FloatingPointError: the loss is not finite any more.
    """
    console, folder = console or Console(stderr=True), Path(folder)
    programs = make_programs(config)
    if resume and not (folder / "checkpoints").is_dir():
        raise ValueError(
            f"no checkpoint in {folder}; start a run there without --resume."
        )
    if not resume:
        _move_earlier_run(folder, console)
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore(programs.abstract_state) if resume else None
        (folder / "config.json").write_text(config.to_json() + "\n")
        # The lowered program at structural costs: virtual devices that share a few
        # cores cannot show their bubble by a clock.
        timeline = simulate(lower(programs.schedule))
        for suffix in ("svg", "png"):
            show.save(timeline, folder / f"schedule.{suffix}")

        with _stop_signals() as stop:
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
            steps = _steps(config, programs, state, text)
            with (
                MetricsLog(folder / "metrics.jsonl", int(state.step)) as log,
                TrainProgress(console, config.num_steps, int(state.step)) as progress,
            ):
                for state, record in steps:
                    record["pipeline_bubble_ratio"] = timeline.bubble_ratio
                    log.write(record)
                    progress.update(record)
                    if record["step"] % config.checkpoint_every == 0:
                        checkpoints.save(record["step"], state)
                    if stop:
                        break
            checkpoints.save(int(state.step), state)
    metrics = read_metrics(folder / "metrics.jsonl")
    draw_loss(metrics, folder / "loss.png")
    return Result(
        step=int(state.step),
        metrics=metrics,
        stopped_by=stop[0] if stop else None,
        compile_s=compile_s,
        train_s=time.perf_counter() - started,
    )


def _steps(
    config: TrainConfig, programs: Programs, state: TrainState, text: data.Text
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """Yields the state after each step that is left, and what the step measured."""
    shape = (config.num_microbatches, config.microbatch_size)
    held_out = data.held_out_batch(text.held_out, shape, config.sequence_length)
    for step in range(int(state.step) + 1, config.num_steps + 1):
        started = time.perf_counter()
        batch = data.sample_batch(
            text.train, shape, config.sequence_length, seed=config.seed, step=step
        )
        state, metrics = programs.train_step(state, *batch)
        record = {"step": step} | {k: float(v) for k, v in metrics.items()}
        seconds = time.perf_counter() - started
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"loss={record['loss']} at {step=}; lower the learning rate, or resume "
                "from the last checkpoint with other data."
            )
        record["tokens_per_s"] = config.tokens_per_step / seconds
        if step % config.eval_every == 0 or step == config.num_steps:
            loss = programs.held_out_loss(state.params, *held_out)
            record["held_out_loss"] = float(loss)
        yield state, record


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
