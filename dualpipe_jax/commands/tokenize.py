"""`python -m dualpipe_jax tokenize`: text as tokens that a model is trained on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress as Bar,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from dualpipe_jax.files import (
    find_files,
    in_mixed_order,
    replace_text,
    stdlib_files,
)
from dualpipe_jax.tokens import (
    DatasetInfo,
    Progress,
    PublishedTokenizer,
    check_folder,
    learn_tokenizer,
    write_tokens,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `tokenize` to a command's parser."""
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files or folders: text, JSON lines (.jsonl, also .gz) or Parquet "
        "(default: the Python standard library's source)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="gets the tokens and the tokenizer; `train --data FOLDER` reads it",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="with tokenizer.json, such as a published model's",
    )
    which.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="learn a tokenizer from the text first, of --vocab-size tokens",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="see above")
    parser.add_argument(
        "--field",
        default="text",
        metavar="NAME",
        help="of the text in JSON lines and Parquet (%(default)s); messages with role "
        "and content are written by the tokenizer's chat template",
    )
    parser.add_argument(
        "--end-token",
        metavar="TOKEN",
        help="follows each document (default: the tokenizer's eos_token)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the folder and says what it holds.

    Raises:
      ValueError: bad input.
    """
    if (args.vocab_size is not None) != args.train_tokenizer:
        raise ValueError("--train-tokenizer and --vocab-size N belong together.")
    files = in_mixed_order(find_files(args.paths) if args.paths else stdlib_files())
    source = ", ".join(args.paths) if args.paths else "the Python standard library"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    check_folder(args.out)
    folder = args.tokenizer
    with _bar(console) as bar:
        if folder is None:
            folder = _learned(args, files, bar)
        tokenizer = PublishedTokenizer(folder)
        end_token = None
        if args.end_token is not None:
            end_token = tokenizer.number_of(args.end_token)
        task = bar.add_task("tokens", total=None, text="")

        def report(progress: Progress) -> None:
            bar.update(
                task,
                completed=progress.num_bytes_read,
                total=progress.num_bytes,
                text=f"{progress.num_tokens:,} tokens",
            )

        info = write_tokens(
            files,
            tokenizer,
            args.out,
            source=source,
            field=args.field,
            end_token=end_token,
            report=report,
        )
    print(summary(info, args.out))
    return 0


def summary(info: DatasetInfo, out: Path) -> str:
    """What a folder of tokens holds, in one line."""
    per_token = info.num_bytes / info.num_tokens
    return (
        f"{out}: {info.num_tokens:,} tokens of {info.num_documents:,} documents, "
        f"{per_token:.2f} bytes per token"
    )


def _learned(args: argparse.Namespace, files: list[Path], bar: Bar) -> Path:
    """The folder of the tokenizer that was learned, now or by a killed process.

    Raises:
      ValueError: that was of another size.
    """
    folder = args.out / ".learned"
    made_from = folder / "settings.json"
    settings = json.dumps({"vocab_size": args.vocab_size, "field": args.field})
    if made_from.is_file():
        if made_from.read_text(encoding="utf-8") != settings:
            raise ValueError(
                f"{args.out} was written with another --vocab-size or --field; remove "
                "it, or use another --out."
            )
        return folder
    task = bar.add_task("vocabulary", total=None, text="")
    learn_tokenizer(
        files,
        args.vocab_size,
        folder,
        field=args.field,
        report=lambda number: bar.update(task, text=f"{number:,} characters"),
    )
    replace_text(made_from, settings)
    bar.update(task, total=1, completed=1)
    return folder


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
    )
