"""The training loop: data, the jitted step, metrics, evaluation and checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from dualpipe_jax.processes import Watch, distributed
from dualpipe_jax.train import data
from dualpipe_jax.train.agreement import check_agreement, check_programs
from dualpipe_jax.train.compiling import CompileProgress
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.folder import Resume
from dualpipe_jax.train.nonfinite import Guard
from dualpipe_jax.train.outputs import RunOutputs
from dualpipe_jax.train.profiler import StepProfiler
from dualpipe_jax.train.programs import Programs
from dualpipe_jax.train.signals import stop_signals
from dualpipe_jax.train.state import TrainState
from dualpipe_jax.train.step import make_programs

PROMPT_TOKENS = 64
# All of a large file would take long to check at once; each batch is checked too.
CHECKED_TOKENS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: optimizer steps done, over all resumptions.
      metrics: the records of metrics.jsonl, and those that could not be written.
      stopped_by: the signal that ended it early, such as `"SIGTERM"`, or None.
      compile_s: seconds that compiling took.
      train_s: seconds of this call's steps, evaluations and checkpoints.
      save_failure: why the last checkpoint could not be written, or None.
      sample: a prompt of held-out text and the model's continuation, or None.
      num_unwritten: how many records could not be written to metrics.jsonl.
    """

    step: int
    metrics: list[dict[str, Any]]
    stopped_by: str | None
    compile_s: float
    train_s: float
    save_failure: str | None = None
    sample: tuple[str, str] | None = None
    num_unwritten: int = 0

    @property
    def held_out_loss(self) -> float | None:
        """The last loss on held-out text, nats per token."""
        return self._last("held_out_loss")

    @property
    def held_out_bits_per_byte(self) -> float | None:
        """The same in bits per byte of text, for models of different tokenizers.

        Tokens that stand for no text, such as those that end documents, are predicted
        too and count in the bits. None: it is not known which text tokens stand for.
        """
        return self._last("held_out_bits_per_byte")

    def _last(self, name: str) -> float | None:
        values = [record[name] for record in self.metrics if name in record]
        return values[-1] if values else None


def train(
    config: TrainConfig,
    text: data.Text,
    folder: str | os.PathLike[str],
    *,
    resume: Resume = False,
    console: Console | None = None,
    profile_steps: int = 0,
    watch: Watch | None = None,
) -> Result:
    """Trains until `config.num_steps`, or until SIGTERM or Ctrl-C; saves either way.

    Several processes (see `distributed.connect`) make the same call. Process 0
    writes and prints; all of them read and write checkpoints; a signal that reaches
    one stops all of them at the same step.

    Args:
      config: the run.
      text: what to train on; see `load_text`.
      folder: gets config.json, metrics.jsonl, pictures and checkpoints. An earlier
        run's files there are moved into a subfolder, unless it is continued.
      resume: continue from the folder's latest checkpoint that is whole, if there is
        one; else begin. With `"must"` a folder without a checkpoint is an error.
      console: where progress is shown.
      profile_steps: how many steps to profile into the folder's `profile`, after the
        first two; `read_trace` reads it.
      watch: is told how far the run is; what `distributed.connect` returns.

    Raises:
      ValueError: `profile_steps` is negative, the processes were not started alike,
        the config fits neither the devices nor the model, or there is no checkpoint
        that can be read; before anything is compiled.
      FloatingPointError: a step's loss, gradient or state is not finite, and the config
        does not skip it. That state is not saved; earlier checkpoints stay.
    """
    if profile_steps < 0:
        raise ValueError(f"{profile_steps=} must be >= 0; 0 profiles nothing.")
    check_agreement(config, text, folder, resume)
    programs = make_programs(config)
    for tokens in (text.held_out, text.train[:CHECKED_TOKENS]):
        programs.check_tokens(tokens)
    text.tokenizer.check_fits(programs.vocab_size)
    console, watch = console or Console(stderr=True), watch or Watch({})
    if not distributed.is_main():
        console = Console(quiet=True)
    with RunOutputs(
        Path(folder), console, config, programs, text, resume=resume
    ) as outputs:
        state, position = outputs.restore()
        outputs.describe()
        with stop_signals() as received:
            programs, state, compile_s = _compile(programs, state, console)
            console.print(_what_runs(config, programs, text, compile_s))
            started = time.perf_counter()
            step, stopped_by = int(state.step), None
            with (
                outputs.recording(step, compile_s, watch) as record,
                outputs.profiler(
                    profile_steps, step + 1, programs.compiled
                ) as profiler,
            ):
                steps = _steps(config, programs, state, position, text, profiler)
                for state, position, metrics, fault in steps:
                    step = metrics["step"]
                    watch.note(f"step {step}")
                    record(metrics)
                    if fault:
                        raise FloatingPointError(fault)
                    if step % config.checkpoint_every == 0:
                        outputs.save(state, position)
                    stopped_by = distributed.first_text(next(iter(received), None))
                    if stopped_by:
                        break
            watch.rest()
            outputs.save(state, position, wait=True)
        train_s = time.perf_counter() - started
        sample = None
        if programs.sample is not None and not stopped_by:
            sample = _sample(config, programs, state, text)
        return Result(
            step=step,
            metrics=outputs.finish(sample, stopped_by),
            stopped_by=stopped_by,
            compile_s=compile_s,
            train_s=train_s,
            save_failure=outputs.save_failure,
            sample=sample,
            num_unwritten=outputs.num_unwritten,
        )


def _what_runs(
    config: TrainConfig, programs: Programs, text: data.Text, compile_s: float
) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in config.mesh.items())
    return (
        f"{config.name}: {programs.schedule.kind} on {mesh}, {text.source}; compiled "
        f"in {compile_s:.0f} s"
    )


def _compile(
    programs: Programs, state: TrainState | None, console: Console
) -> tuple[Programs, TrainState, float]:
    """Compiled programs, the state to begin with, and the seconds that it took."""
    with CompileProgress(console) as progress:
        programs = programs.compile(progress)
        check_programs(programs.collectives)
        begun: TrainState = programs.init() if state is None else state
        seconds = progress.elapsed_s
    if state is None and programs.published is not None:
        begun = programs.published(begun)
    return programs, begun, seconds


class _Step(NamedTuple):
    """What a step has done.

    Attributes:
      state: after the step.
      position: sequences seen.
      record: what it measured.
      fault: why the run must end here, without saving; or empty.
    """

    state: TrainState
    position: int
    record: dict[str, Any]
    fault: str


def _steps(
    config: TrainConfig,
    programs: Programs,
    state: TrainState,
    position: int,
    text: data.Text,
    profiler: StepProfiler,
) -> Iterator[_Step]:
    """Yields what each step left to do has done."""
    shape = (config.num_microbatches, config.microbatch_size)
    held_out = data.held_out_batch(text.held_out, shape, config.sequence_length)
    bytes_per_token = _bytes_per_token(text, held_out[1], config.ignore_index)
    guard = Guard(config.max_skipped_steps)
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
            grads_finite = metrics.pop("grads_finite", None)
            record: dict[str, Any] = {"step": step}
            record |= {k: _plain(v) for k, v in metrics.items()}
        position += math.prod(shape)
        seconds = time.perf_counter() - started
        record["tokens_per_s"] = config.tokens_per_step / seconds
        fault = guard.fault(record, programs.grad_names, grads_finite)
        is_due = step % config.eval_every == 0 or step == config.num_steps
        if is_due and not fault:
            loss = float(programs.held_out_loss(state, *held_out))
            record["held_out_loss"] = loss
            if bytes_per_token:
                bits = loss / math.log(2) / bytes_per_token
                record["held_out_bits_per_byte"] = bits
        yield _Step(state, position, record, fault)


def _bytes_per_token(
    text: data.Text, targets: np.ndarray, ignore_index: int | None
) -> float | None:
    """How much text a target stands for; None if that is not known."""
    if ignore_index is not None:
        targets = targets[targets != ignore_index]
    num_bytes = text.count_bytes(targets)
    return num_bytes / targets.size if num_bytes else None


def _plain(value: Any) -> float | list[float]:
    """A metric for JSON; for one value per layer, four decimals are plenty."""
    array = np.asarray(value)
    return array.astype(float).round(4).tolist() if array.ndim else float(array)


def _sample(
    config: TrainConfig, programs: Programs, state: TrainState, text: data.Text
) -> tuple[str, str]:
    """A prompt of held-out text, and the model's continuation, as text."""
    assert programs.sample is not None
    length = min(PROMPT_TOKENS, max(1, config.sequence_length // 2))
    prompt = np.asarray(text.held_out[:length], np.int32)
    new = np.asarray(programs.sample(state, prompt))

    return text.tokenizer.decode(prompt.tolist()), text.tokenizer.decode(new.tolist())
