"""The command line: `python -m dualpipe_jax COMMAND ...`.

A command is a function that adds its arguments to a parser, and a `run(args)` that
returns the exit status. `COMMANDS` names these functions by text, so that a command
loads what it needs, and jax only if it needs jax.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command lives, and what it does in a few words.

    Attributes:
      target: `module:function`; function(parser) adds the arguments. What runs is
        the `handler` that it sets with `parser.set_defaults`, or else the module's
        `run`: a function of the parsed arguments that returns the exit status.
      help: one line for the list of commands.
      extra: of this package, which installs what the command needs.
    """

    target: str
    help: str
    extra: str = "viz"


COMMANDS = {
    "train": Command(
        "dualpipe_jax.commands.train:add_arguments",
        "train a language model, as a config says",
        "train",
    ),
    "serve": Command(
        "dualpipe_jax.commands.serve:add_arguments",
        "complete prompts with a model that train has trained",
        "train",
    ),
    "report": Command(
        "dualpipe_jax.commands.report:add_arguments",
        "a training run as one page of HTML",
    ),
    "overlap": Command(
        "dualpipe_jax.commands.overlap:add_arguments",
        "what of a compiled step's communication runs under compute",
    ),
    "memory": Command(
        "dualpipe_jax.commands.memory:add_arguments",
        "what a train step needs of a GPU's memory, and for what",
    ),
    "schedule": Command(
        "dualpipe_jax.commands.schedule:add_arguments", "draw a schedule, or export it"
    ),
    "simulate": Command(
        "dualpipe_jax.commands.simulate:add_arguments",
        "makespan, bubbles and activations",
    ),
    "trace": Command(
        "dualpipe_jax.commands.trace:add_arguments",
        "what a profile says of the overlap: PyTorch's, JAX's, or our own",
    ),
    "bubbles": Command(
        "dualpipe_jax.commands.bubbles:add_arguments",
        "the schedules' bubbles over the number of microbatches",
    ),
    "choose": Command(
        "dualpipe_jax.commands.choose:add_arguments",
        "rank the schedules by step time under a memory limit, and say why",
    ),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(
        prog="python -m dualpipe_jax",
        description="DeepSeek's DualPipe for JAX.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    try:
        for name, command in COMMANDS.items():
            # Only the command that is asked for is loaded.
            subparser = commands.add_parser(name, help=command.help)
            if argv[:1] == [name]:
                subparser.description = command.help.capitalize() + "."
                _add_arguments(subparser, command.target)
        args = parser.parse_args(argv)
        status = args.handler(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever reads has read enough; Python must not complain when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        name = " ".join([parser.prog, *argv[:1]])
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and not missing.startswith("dualpipe_jax"):
            extra = COMMANDS[argv[0]].extra
            error = f"needs {missing}; pip install 'dualpipe-jax[{extra}]'."
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _add_arguments(parser: argparse.ArgumentParser, target: str) -> None:
    module_name, _, function = target.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, function)(parser)
    if parser.get_default("handler") is None:
        parser.set_defaults(handler=module.run)
