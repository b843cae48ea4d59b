"""`python -m dualpipe_jax overlap`: the overlap report of a step or a module."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from dualpipe_jax.commands.gpu_config import add_gpu, load_for_gpus
from dualpipe_jax.gpu.overlap import OverlapReport, compile_overlapped, overlap_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `overlap` to a command's parser."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="as for train or serve; its step is compiled for GPUs, none of which are "
        "needed. Or the text of a scheduled module, FILE.hlo",
    )
    add_gpu(parser)
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.7,
        metavar="FRACTION",
        help="of the GPU's peaks that kernels reach (%(default)s)",
    )
    parser.add_argument(
        "--trips",
        action="append",
        default=[],
        metavar="BODY=N",
        help="trips of a loop whose trips depend on data, by the name of its body or a "
        "pattern; may be given several times",
    )
    parser.add_argument(
        "--loop", metavar="NAME", help="show and trace this loop, not the steady state"
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw the estimated timeline: .png, .svg or .pdf",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write the estimated timeline as a Chrome trace, for Perfetto",
    )


def run(args: argparse.Namespace) -> int:
    """Reports as `add_arguments` describes; returns the exit status.

    Raises:
      ValueError: bad input.
    """
    report = _report(args)
    if args.trace is not None:
        report.chrome_trace(args.loop, args.trace)
    if args.figure is not None:
        report.figure(args.loop).savefig(args.figure, dpi=150)
    if args.json:
        print(report.to_json())
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console

        console = Console()
        console.print(report.summary(args.loop), highlight=False, soft_wrap=True)
        console.print(report.table(args.loop))
    else:
        print(report.text(args.loop))
    return 0


def _report(args: argparse.Namespace) -> OverlapReport:
    trip_counts = parse_trips(args.trips)
    if args.config.endswith((".hlo", ".txt")):
        compiled = Path(args.config).read_text(encoding="utf-8")
    else:
        # The training job is not needed to read a module.
        from dualpipe_jax.train import StepConfig

        config, mesh = load_for_gpus(
            StepConfig, args.config, args.gpu, gpus_per_node=args.gpus_per_node
        )
        compiled = compile_overlapped(
            config.lower_step(mesh),
            gpu=args.gpu,
            gpus_per_node=args.gpus_per_node,
            efficiency=args.efficiency,
        )
    return overlap_report(
        compiled,
        gpu=args.gpu,
        gpus_per_node=args.gpus_per_node,
        efficiency=args.efficiency,
        trip_counts=trip_counts,
    )


def parse_trips(texts: list[str]) -> dict[str, float]:
    """Reads `BODY=N` from each text.

    Raises:
      ValueError: a text has another form, or N is negative.

    Examples:
      >>> parse_trips(["region_7.*=320"])
      {'region_7.*': 320.0}
    """
    trips: dict[str, float] = {}
    for text in texts:
        body, sign, number = text.rpartition("=")
        try:
            trips[body] = float(number)
        except ValueError:
            sign = ""
        if not sign or not body or not trips[body] >= 0:
            raise ValueError(f"--trips {text!r} must be BODY=N, with N at least 0.")
    return trips
