"""`python -m dualpipe_jax export RUN`: writes a run's weights for other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dualpipe_jax.deepseek.pretrained import export_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `export` to a command's parser."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="a new folder, which transformers, vLLM and SGLang can load",
    )
    parser.add_argument(
        "--like",
        metavar="FOLDER",
        type=Path,
        help="a published model that names, dtypes, tokenizer and other files are "
        "taken from (default: the one that the run began with, if any)",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the weights, without such a model (%(default)s)",
    )
    parser.add_argument(
        "--fp8",
        action="store_true",
        help="without such a model: the layers' matrices in float8, with scales of "
        "blocks of 128 x 128, as DeepSeek publishes them",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the folder and prints where it is."""

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    options = {"like": args.like, "dtype": args.dtype, "fp8": args.fp8}
    export_run(args.run, args.out, say=say, **options)
    print(args.out)
    return 0
