"""`python -m dualpipe_jax train`: the main job from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from rich.console import Console

from dualpipe_jax.train.config import TrainConfig, load_config
from dualpipe_jax.train.data import load_text
from dualpipe_jax.train.loop import Result, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `train` to a command's parser."""
    parser.add_argument(
        "config", help="a Python file that defines config(), or a name such as bytes"
    )
    parser.add_argument("--steps", type=int, help="train for this many steps in all")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files or folders of text (default: the Python standard library's source)",
    )
    parser.add_argument("--out", type=Path, help="the run's folder (runs/NAME)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in the run's folder",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the job that `add_arguments` describes.

    Returns:
      The exit status: 0, also after a signal that was asked to stop; 1 if the loss
      is not finite any more.

    Raises:
      ValueError: bad input, before anything is compiled.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every file.
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config = load_config(args.config)
    if args.steps is not None:
        config = dataclasses.replace(config, num_steps=args.steps)
    text = load_text(
        args.data,
        sequence_length=config.sequence_length,
        held_out_fraction=config.held_out_fraction,
    )
    folder = args.out or Path("runs") / config.name
    try:
        result = train(config, text, folder, resume=args.resume, console=console)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(config, result, folder))
    return 0


def summary(config: TrainConfig, result: Result, folder: Path) -> str:
    """What a run came to, in a few lines."""
    done = f"{result.step} of {config.num_steps} steps"
    if result.stopped_by:
        done = f"stopped by {result.stopped_by} after {done}; --resume continues"
    lines = [
        f"{done} ({result.compile_s:.0f} s to compile, {result.train_s:.0f} s to train)"
    ]
    if result.metrics:
        first, last = result.metrics[0], result.metrics[-1]
        rates = sorted(record["tokens_per_s"] for record in result.metrics)
        lines.append(
            f"loss           {last['loss']:.3f} nats a byte "
            f"(first step {first['loss']:.3f})"
        )
        if result.held_out_loss is not None:
            lines.append(f"held-out loss  {result.held_out_loss:.3f} nats a byte")
        lines += [
            f"tokens/s       {rates[len(rates) // 2]:,.0f} (median)",
            f"bubble         {last['pipeline_bubble_ratio']:.1%} of the schedule",
        ]
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    lines.append(f"files          {folder}: checkpoints, {', '.join(names)}")
    return "\n".join(lines)
