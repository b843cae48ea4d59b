"""The command line: `python -m eplb_jax rebalance LOADS` and `replay LOADS`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from eplb_jax.commands import rebalance, replay


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, like every other error here."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments after the program's name; None: those of this process.

    Returns:
      The exit status: 2 for bad input.
    """
    parser = _Parser(
        prog="python -m eplb_jax", description="Expert load balancing for JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rebalance.add_arguments(
        commands.add_parser("rebalance", help="plan a placement and show it")
    )
    replay.add_arguments(
        commands.add_parser(
            "replay", help="plan on each recorded window, score on the next"
        )
    )
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError as error:
        print(f"{parser.prog}: error: too little memory: {error}", file=sys.stderr)
        return 2
    except (ValueError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        print(f"{parser.prog}: error: {reason}", file=sys.stderr)
        return 2
    return 0
