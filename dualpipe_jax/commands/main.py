"""The command line: `python -m dualpipe_jax COMMAND ...`.

Each command is a module of its name: `add_arguments(parser)` describes its arguments,
and `run(args)` returns the exit status. Only the command that runs is imported, and jax
only if that command needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dualpipe_jax.commands.arguments import OneLineParser
from eplb_jax import plugins


class Command(NamedTuple):
    """What a command does, and what it needs.

    Attributes:
      help: one line for the list of commands.
      extra: the extra of this package that installs what the command needs.
    """

    help: str
    extra: str = "viz"


# Packages that only some uses of a command need, and the extra that installs them.
_EXTRAS = {
    "jinja2": "text",
    "pyarrow": "parquet",
    "starlette": "http",
    "tokenizers": "text",
    "uvicorn": "http",
}

COMMANDS = {
    "train": Command("train a language model from a config", "train"),
    "launch": Command(
        "start a training run's processes, and again when some are lost", "train"
    ),
    "tokenize": Command("write text as tokens to train on", "text"),
    "serve": Command("complete prompts with a trained model", "train"),
    "export": Command(
        "write a training run's weights as a Hugging Face folder", "train"
    ),
    "report": Command("write a training run as one HTML page", "train"),
    "overlap": Command(
        "show which communication of a compiled step is hidden", "train"
    ),
    "memory": Command("show what fills a GPU's memory in a train step", "train"),
    "schedule": Command("draw a schedule, or export it"),
    "simulate": Command("compute makespan, bubbles and activations"),
    "trace": Command("show the overlap in a profile: PyTorch's, JAX's, or our own"),
    "bubbles": Command("compare schedules' bubbles over the number of microbatches"),
    "choose": Command("rank schedules by step time under a memory limit, and say why"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = OneLineParser(
        prog="python -m dualpipe_jax",
        description="DeepSeek's DualPipe for JAX.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    try:
        for name, command in COMMANDS.items():
            # Only the command that runs is imported.
            subparser = commands.add_parser(name, help=command.help)
            if argv[:1] == [name]:
                subparser.description = f"{command.help[0].upper()}{command.help[1:]}."
                with plugins.without_messages(), _without_collections():
                    add_arguments(subparser, name)
                    plugins.load()
        args = parser.parse_args(argv)
        status = args.handler(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has closed the pipe; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        is_too_large = _is_too_large(error)
        if isinstance(error, RuntimeError) and not is_too_large:
            raise
        name = " ".join([parser.prog, *argv[:1]])
        if package := _missing_package(error):
            extra = _EXTRAS.get(package, COMMANDS[argv[0]].extra)
            error = f"needs {package}; pip install 'dualpipe-jax[{extra}]'."
        if is_too_large:
            what = f"{type(error).__name__}: {error}".removesuffix(": ")
            error = f"{what}; the input is too large, or nested too deeply."
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Imports in peace: looking for garbage, which they do not make, takes a sixth.

    What is there afterwards stays, and later collections do not look at it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _is_too_large(error: BaseException) -> bool:
    """Whether an error is about memory, also a device's, or about depth."""
    is_of_device = str(error).startswith("RESOURCE_EXHAUSTED")
    return isinstance(error, MemoryError | RecursionError) or is_of_device


def _missing_package(error: BaseException | None) -> str:
    """Returns which other package's absence has caused an error; empty: none."""
    while isinstance(error, ImportError):
        # Other errors that say what to install do not know which command runs.
        if isinstance(error, ModuleNotFoundError):
            package = (error.name or "").partition(".")[0]
            return "" if package in ("dualpipe_jax", "eplb_jax") else package
        error = error.__cause__
    return ""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Gives a parser the arguments of a command, and the function that runs it."""
    module = importlib.import_module(f"dualpipe_jax.commands.{name}")
    module.add_arguments(parser)
    parser.set_defaults(handler=module.run)
