"""`python -m dualpipe_jax report RUN`: writes a run's page."""

from __future__ import annotations

import argparse
from pathlib import Path

from dualpipe_jax.train import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `report` to a command's parser."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="default: RUN/report.html"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is."""
    print(write_report(args.run, args.out))
    return 0
