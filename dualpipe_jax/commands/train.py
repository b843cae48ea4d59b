"""`python -m dualpipe_jax train`: the main job from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import statistics
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from dualpipe_jax.commands.arguments import add_no_cache
from dualpipe_jax.processes import (
    HEARTBEAT_S,
    LOST,
    STEP_TIMEOUT_S,
    Watch,
    distributed,
    launcher,
    may_pass,
)
from dualpipe_jax.schedules.generators import SCHEDULES
from dualpipe_jax.train import (
    AXES,
    Result,
    TrainConfig,
    compilation_cache,
    load_config,
    load_text,
    train,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `train` to a command's parser."""
    parser.add_argument(
        "config", help="a Python file that defines config(), or a name such as tiny"
    )
    parser.add_argument("--steps", type=int, help="train for this many steps in all")
    parser.add_argument(
        "--schedule", choices=list(SCHEDULES), help="in place of the config's"
    )
    parser.add_argument(
        "--mesh",
        metavar="pp=4,ep=2",
        help="sizes of pp, dp and ep in place of the config's, one where not given; a "
        "run may be resumed on another mesh and schedule",
    )
    parser.add_argument(
        "--pretrained",
        metavar="FOLDER",
        help="begin with the weights of this published model, a Hugging Face folder; "
        "the config's architecture is DeepSeekConfig.from_pretrained of it",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files or folders of text, or what `tokenize` has written (default: the "
        "Python standard library's source)",
    )
    parser.add_argument("--out", type=Path, help="the run's folder (runs/NAME)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in the run's folder, if there is one, "
        "else begin",
    )
    parser.add_argument(
        "--resume=must",
        dest="resume",
        action="store_const",
        const="must",
        help="the same, but without a checkpoint it is an error",
    )
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=2,
        default=0,
        metavar="STEPS",
        help="profile so many steps (2) into the run's folder; `trace FOLDER/profile` "
        "reads it",
    )
    add_no_cache(parser)
    _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group(
        "several processes", "start the same command once per process"
    )
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, at a free port"
    )
    several.add_argument("--num-processes", type=int, metavar="N", help="of the run")
    several.add_argument(
        "--process-id", type=int, metavar="I", help="of this process, from 0"
    )
    several.add_argument(
        "--distributed",
        action="store_true",
        help="in place of these three: take them from the cluster's environment "
        "(Slurm, Open MPI, Kubernetes, Cloud TPU)",
    )
    several.add_argument(
        "--heartbeat",
        type=float,
        default=HEARTBEAT_S,
        metavar="SECONDS",
        help="without a sign of life of a process, after which the others end with "
        "status 75 (%(default)g)",
    )
    several.add_argument(
        "--step-timeout",
        type=float,
        default=STEP_TIMEOUT_S,
        metavar="SECONDS",
        help="that a step with its evaluation may take; then the processes print the "
        "stacks of their threads and end with status 75; 0: any (%(default)g)",
    )
    several.add_argument(
        "--connect-timeout",
        type=float,
        default=distributed.TIMEOUT_S,
        metavar="SECONDS",
        help="within which all processes must connect (%(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the job that `add_arguments` describes.

    Returns:
      The exit status: 0, also if a signal stopped the run; 1 if the loss, gradient or
      state is no longer finite, or the last checkpoint or record could not be written;
      75 if a process of several was lost, or the devices failed.

    Raises:
      ValueError: bad input, before anything is compiled.
    """
    _quieten_orbax()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config = configured(args)
    text = load_text(
        args.data,
        sequence_length=config.sequence_length,
        held_out_fraction=config.held_out_fraction,
    )
    folder = folder_of(args, config)
    try:
        with (
            _connect(args) as watch,
            compilation_cache(console.print, enabled=not args.no_cache),
        ):
            result = train(
                config,
                text,
                folder,
                resume=args.resume,
                console=console,
                profile_steps=args.profile,
                watch=watch,
            )
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError) as error:
        if not may_pass(error):
            raise
        traceback.print_exc()
        print("error: see above; --resume continues the run.", file=sys.stderr)
        return LOST
    if result.metrics:
        print(summary(config, result, folder, text.unit))
    return 1 if result.save_failure or result.num_unwritten else 0


def configured(args: argparse.Namespace) -> TrainConfig:
    """The config that the arguments name, with what they change."""
    config = load_config(args.config)
    changes: dict[str, Any] = {
        "num_steps": args.steps,
        "schedule": args.schedule,
        "pretrained": args.pretrained,
        "mesh": None if args.mesh is None else parse_mesh(args.mesh),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **changes)


def folder_of(args: argparse.Namespace, config: TrainConfig) -> Path:
    """The run's folder."""
    return args.out or Path("runs") / config.name


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `pp=4,ep=2`.

    Raises:
      ValueError: a part is not AXIS=SIZE, or an axis is unknown or given twice.

    Examples:
      >>> parse_mesh("pp=4,ep=2")
      {'pp': 4, 'ep': 2}
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in mesh or not size.isdecimal():
            raise ValueError(
                f"--mesh {text!r}: {part.strip()!r} must be AXIS=SIZE, with each of "
                f"{', '.join(AXES)} at most once."
            )
        mesh[axis] = int(size)
    return mesh


def _connect(args: argparse.Namespace) -> Watch:
    given = [args.coordinator, args.num_processes, args.process_id]
    if args.distributed and any(value is not None for value in given):
        raise ValueError(
            "--distributed takes all from the cluster's environment; leave it out, or "
            "leave out --coordinator, --num-processes and --process-id."
        )
    if args.distributed or any(value is not None for value in given):
        return distributed.connect(
            *given,
            timeout=args.connect_timeout,
            heartbeat=args.heartbeat,
            step_timeout=args.step_timeout,
        )
    return Watch({}, launcher=launcher(), step_timeout=args.step_timeout)


def summary(
    config: TrainConfig, result: Result, folder: Path, unit: str = "byte"
) -> str:
    """A run's results in a few lines."""
    done = f"{result.step} of {config.num_steps} steps"
    if result.stopped_by:
        done = f"stopped by {result.stopped_by} after {done}; --resume continues"
    lines = [
        f"{done} ({result.compile_s:.0f} s to compile, {result.train_s:.0f} s to train)"
    ]
    series = functools.partial(_series, result.metrics)
    if losses := series("loss"):
        lines.append(
            f"loss           {losses[-1]:.3f} nats per {unit} "
            f"(first step {losses[0]:.3f})"
        )
    if result.held_out_loss is not None:
        line = f"held-out loss  {result.held_out_loss:.3f} nats per {unit}"
        if (bits := result.held_out_bits_per_byte) is not None:
            line += f", {bits:.3f} bits per byte"
        lines.append(line)
    if skipped := sum(series("skipped")):
        lines.append(f"skipped        {skipped:.0f} steps that were not finite")
    if without := series("balancedness_unplaced")[-10:]:
        now = series("balancedness")[-10:]
        lines.append(
            f"balancedness   {statistics.fmean(now):.3f} with EPLB, "
            f"{statistics.fmean(without):.3f} without "
            f"(mean of the last {len(without)} steps)"
        )
    if exact := series("balancedness_exact")[-10:]:
        before = series("balancedness_before")[-10:]
        lines.append(
            f"exact balance  {statistics.fmean(exact):.3f}, "
            f"{statistics.fmean(before):.3f} before each microbatch's plan; "
            f"{series('fetched_experts')[-1]:.2f} experts fetched per device and layer"
        )
    if rates := sorted(series("tokens_per_s")):
        lines.append(f"tokens/s       {rates[len(rates) // 2]:,.0f} (median)")
    if bubble := series("pipeline_bubble_ratio"):
        lines.append(f"bubble         {bubble[-1]:.1%} of the schedule")
    names = sorted(path.name for path in folder.glob("[!.]*") if path.is_file())
    lines.append(f"files          {folder}: checkpoints, {', '.join(names)}")
    if result.save_failure:
        lines.append(
            f"NOT SAVED      the last checkpoint could not be written: "
            f"{result.save_failure}"
        )
    if result.num_unwritten:
        lines.append(
            f"NOT SAVED      the last {result.num_unwritten} records could not be "
            "written to metrics.jsonl"
        )
    if result.sample is not None:
        prompt, new = result.sample
        lines += ["sample         held-out text | the model's continuation", ""]
        lines += [f"{prompt}|{new}"]
    return "\n".join(lines)


def _series(metrics: list[dict[str, Any]], name: str) -> list[float]:
    """The finite values of a metric, step by step."""
    values = (record.get(name) for record in metrics)
    return [value for value in values if value is not None]


def _quieten_orbax() -> None:
    """Leaves the console to the loop.

    Orbax logs every file, and every failure with its stack. After one of several
    concurrent failures, Python, asyncio and tensorstore print the others.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook
    threadhook = threading.excepthook

    def of_orbax(trace: TracebackType | None) -> bool:
        frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
        return any("orbax" in name or "asyncio" in name for name in frames)

    def on_except(kind, error, trace):
        # Tensorstore's threads print this one; all other errors are ours.
        if not (isinstance(error, RuntimeError) and "loop is closed" in str(error)):
            excepthook(kind, error, trace)

    def on_unraisable(unraisable):
        if not of_orbax(unraisable.exc_traceback):
            unraisablehook(unraisable)

    def on_thread(args):
        if not of_orbax(args.exc_traceback):
            threadhook(args)

    sys.excepthook, sys.unraisablehook = on_except, on_unraisable
    threading.excepthook = on_thread
