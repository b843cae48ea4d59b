"""The command `bubbles`: how schedules' bubbles shrink with more microbatches."""

from __future__ import annotations

import argparse
from pathlib import Path

from dualpipe_jax.commands.arguments import (
    add_lowered,
    parse_costs,
    read_integers,
)
from dualpipe_jax.pictures import bubble_ratio, bubble_ratios, bubble_table
from dualpipe_jax.schedules.generators import SCHEDULES, check_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--ranks P [--microbatches M,...] [--costs ...] [--out FILE]`."""
    add = parser.add_argument
    add("--ranks", metavar="P", type=int, required=True, help="size of the pipeline")
    add("--microbatches", metavar="M,...", help="default: P to 8P in steps of P/2")
    add(
        "--costs",
        default="",
        metavar="F=97,I=104,...",
        help="of F, I, W, B (default I+W), FB (default F+B) and p2p; default 1, p2p 0",
    )
    add("--schedules", metavar="NAME,...", help=f"of {', '.join(SCHEDULES)}")
    add_lowered(parser)
    add("--out", metavar="FILE", type=Path, help="draw a figure: .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    """Prints a table, or draws a figure."""
    numbers = None
    if args.microbatches:
        numbers = read_integers("--microbatches", args.microbatches)
    check_size(args.ranks, max(numbers or [8 * args.ranks]))
    given = (
        args.ranks,
        numbers,
        parse_costs(args.costs),
        args.schedules.split(",") if args.schedules else None,
    )
    if args.out is not None:
        bubble_ratio(*given, lowered=args.lowered).savefig(args.out, dpi=150)
    else:
        print(bubble_table(bubble_ratios(*given, lowered=args.lowered)))
    return 0
