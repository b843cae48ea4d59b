"""The command `schedule`: draws a schedule, or exports it."""

from __future__ import annotations

import argparse
from pathlib import Path

from dualpipe_jax import pictures
from dualpipe_jax.commands.arguments import (
    add_lowered,
    add_schedule_arguments,
    parse_costs,
    read_schedule,
)
from dualpipe_jax.lowering import lower
from dualpipe_jax.schedules import simulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `KIND --ranks P --microbatches M [--format ...] [--out FILE]`."""
    add_schedule_arguments(parser)
    add_lowered(parser)
    parser.add_argument(
        "--format",
        choices=list(pictures.FORMATS),
        help="default: by FILE's suffix, else text",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: stdout")


def run(args: argparse.Namespace) -> int:
    """Draws or exports the schedule that the arguments name."""
    schedule, costs = read_schedule(args), parse_costs(args.costs)
    timeline = simulate(schedule, costs)
    if args.lowered:
        timeline = simulate(lower(schedule), costs)
    if args.out is not None:
        pictures.save(timeline, args.out, args.format)
        return 0
    if args.format == "png":
        raise ValueError("--format png is binary; name a file with --out.")
    print(pictures.FORMATS[args.format or "text"](timeline), end="")
    return 0
