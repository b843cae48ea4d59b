"""`python -m dualpipe_jax trace`: the overlap in a profile."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from dualpipe_jax import pictures
from dualpipe_jax.profiles import read_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `trace` to a command's parser."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a Chrome or Perfetto trace, .json or .json.gz, of PyTorch's or JAX's "
        "profiler, or the folder of a jax.profiler trace, such as RUN/profile",
    )
    parser.add_argument(
        "--communication",
        action="append",
        default=[],
        metavar="REGEX",
        help="kernels whose names match it communicate as well; may be given several "
        "times",
    )
    parser.add_argument(
        "--chunks",
        type=int,
        metavar="N",
        help="number of forwards that each device ran, by which costs are divided "
        "(default: the number of pairs that the profile marks, or 1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw the timeline of a device, its communication hidden or exposed, as "
        "PNG, SVG or PDF",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="for --figure, such as 'GPU 1' (the first)"
    )


def run(args: argparse.Namespace) -> int:
    """Reports as `add_arguments` describes; returns the exit status.

    Raises:
      ValueError: bad input.
    """
    with _status(f"reading {args.file}"):
        report = read_trace(args.file, args.communication)
    if args.figure is not None:
        pictures.timeline(report, device=args.device).savefig(args.figure)
    if args.json:
        print(json.dumps(report.as_json(args.chunks)))
    else:
        print(report.text(args.chunks))
    return 0


def _status(text: str) -> AbstractContextManager:
    """Shows a text on a terminal while something takes a while."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return contextlib.nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)
