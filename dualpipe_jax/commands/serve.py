"""`python -m dualpipe_jax serve`: completions of prompts, as they are written."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from dualpipe_jax.deepseek.serve import (
    Engine,
    ServeConfig,
    Token,
    load_checkpoint,
    make_serve_mesh,
    prometheus,
)
from dualpipe_jax.profiles import profile
from dualpipe_jax.train import load_as

_OPTIONS = ("max_tokens", "temperature", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `serve` to a command's parser."""
    parser.add_argument(
        "config",
        help="a name such as tiny_server, or FILE.py:FUNCTION that returns a "
        "ServeConfig",
    )
    parser.add_argument(
        "prompts",
        nargs="?",
        default="-",
        metavar="FILE",
        help="a prompt a line; or, in FILE.jsonl, objects with a prompt and perhaps "
        "max_tokens, temperature and seed (default: standard input)",
    )
    parser.add_argument(
        "--run",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of the training run whose latest checkpoint is served",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=64,
        metavar="N",
        help="to write for a prompt, at most (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time (%(default)g)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is drawn (%(default)s)"
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="write the metrics at the end, as text for Prometheus",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="profile the first prompts that are served together; `trace FOLDER` reads "
        "it",
    )


def run(args: argparse.Namespace) -> int:
    """Serves as `add_arguments` describes.

    Returns:
      The exit status: 1 if a prompt was refused; the others are served then.

    Raises:
      ValueError: bad input; but for a file without prompts, before anything compiles.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config = load_as(ServeConfig, args.config)
    defaults = {name: getattr(args, name) for name in _OPTIONS}
    number = num_refused = 0
    with _opened(args.prompts) as file:
        # Who types is answered line by line; what is piped is served together.
        groups = ([line] for line in file) if file.isatty() else [list(file)]
        engine = _start(config, args.run, console)
        profiled = contextlib.nullcontext()
        if args.profile is not None:
            profiled = profile(args.profile, *engine.programs.compiled)
        for lines in groups:
            texts: dict[int, str] = {}
            for found in read_prompts(lines, config, defaults, args.prompts):
                number += 1
                try:
                    if isinstance(found, ValueError):
                        raise found
                    request = engine.submit(**found)
                except ValueError as error:
                    console.print(f"prompt {number} is refused: {error}", markup=False)
                    num_refused += 1
                else:
                    texts[request] = as_text(config, found["prompt"])
            if texts:
                with profiled:
                    stream(engine, config, texts, sys.stdout)
                profiled = contextlib.nullcontext()
    if number == 0:
        raise ValueError(f"{args.prompts} holds no prompt; write one a line.")
    console.print(summary(engine.metrics()))
    if args.metrics is not None:
        args.metrics.write_text(prometheus(engine.metrics()))
    return 1 if num_refused else 0


def _start(config: ServeConfig, folder: Path, console: Console) -> Engine:
    """An engine with a run's weights, placed for the load that it saw; compiled."""
    mesh = make_serve_mesh(config)
    params, placement = load_checkpoint(config, folder, mesh=mesh, say=console.print)
    engine = Engine(config, params, mesh=mesh)
    with console.status("compiling"):
        engine.compile()
    if placement is not None:
        engine.place(placement)
    return engine


def stream(
    engine: Engine, config: ServeConfig, texts: Mapping[int, str], out: TextIO
) -> None:
    """Writes prompts with their completions, in their order.

    The first request that is not done is written token by token; those behind it are
    computed beside it, and wait for their turn to be written.
    """
    held: dict[int, list[Token]] = {request: [] for request in texts}
    turns = iter(texts)
    begun: set[int] = set()
    turn, decode = next(turns, None), _decoder(config)
    for token in engine.run():
        held[token.request].append(token)
        while turn is not None and held[turn]:
            ready, held[turn] = held[turn], []
            text = decode([each.token for each in ready], ready[-1].is_last)
            out.write((texts[turn] if turn not in begun else "") + text)
            begun.add(turn)
            if not ready[-1].is_last:
                break
            out.write("\n")
            turn, decode = next(turns, None), _decoder(config)
        out.flush()


def read_prompts(
    lines: Iterable[str], config: ServeConfig, defaults: dict[str, Any], name: str
) -> Iterator[dict[str, Any] | ValueError]:
    """The options of `Engine.submit` for each line, or what is wrong with it."""
    for line in lines:
        text = line.rstrip("\n")
        if not text:
            continue
        try:
            options: dict[str, Any] = {"prompt": text}
            if name.endswith(".jsonl"):
                options = _read_object(text)
            options["prompt"] = as_tokens(config, options["prompt"])
            yield defaults | options
        except ValueError as error:
            yield error


def _read_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text[:60]!r} is no JSON ({error}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError(f'{text[:60]!r} must be an object with "prompt": "...".')
    if unknown := found.keys() - {"prompt", *_OPTIONS}:
        raise ValueError(
            f"{sorted(unknown)[0]!r} is unknown; beside prompt there are "
            f"{', '.join(_OPTIONS)}."
        )
    for option in _OPTIONS:
        kinds = (int, float) if option == "temperature" else (int,)
        if option in found and type(found[option]) not in kinds:
            raise ValueError(f"{option}={found[option]!r} must be a number.")
    return found


def as_tokens(config: ServeConfig, text: str) -> list[int]:
    """A prompt's bytes, or, for a larger vocabulary, the numbers that it consists of.

    Raises:
      ValueError: it has something else than numbers.
    """
    if config.architecture.vocab_size == 256:
        return list(text.encode())
    words = text.split()
    if not all(word.isdecimal() for word in words):
        raise ValueError(
            f"prompt {text[:40]!r} must be token numbers, separated by spaces."
        )
    return [int(word) for word in words]


def as_text(config: ServeConfig, tokens: list[int]) -> str:
    """The inverse of `as_tokens`."""
    return _decoder(config)(tokens, True)


def _decoder(config: ServeConfig) -> Callable[[list[int], bool], str]:
    """Tokens to text, a few at a time; bytes that are no text become U+FFFD.

    The function that it returns takes tokens, and whether they are the last.
    """
    if config.architecture.vocab_size == 256:
        # A letter of several bytes is written when it is whole.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda tokens, is_last: decoder.decode(bytes(tokens), is_last)
    return lambda tokens, is_last: "".join(f"{token} " for token in tokens)


def summary(metrics: dict[str, float]) -> str:
    """What was served, in a line."""
    return (
        f"{metrics['num_tokens']:.0f} tokens in {metrics['num_prefills']:.0f} prefills "
        f"and {metrics['num_decode_steps']:.0f} decode steps, "
        f"{metrics['tokens_per_s']:.0f} tokens/s; balancedness "
        f"{metrics['balancedness']:.3f} (worst layer "
        f"{metrics['balancedness_worst']:.3f}) after {metrics['num_moves']:.0f} moves"
    )


@contextlib.contextmanager
def _opened(name: str) -> Iterator[TextIO]:
    if name == "-":
        yield sys.stdin
    else:
        with Path(name).open(encoding="utf-8") as file:
            yield file
