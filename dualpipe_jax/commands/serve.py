"""`python -m dualpipe_jax serve`: writes completions as it computes them."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from dualpipe_jax.commands.arguments import add_no_cache
from dualpipe_jax.deepseek.serve import (
    Engine,
    ServeConfig,
    Token,
    check_options,
    load_checkpoint,
    load_published,
    make_serve_mesh,
    prometheus,
)
from dualpipe_jax.profiles import profile
from dualpipe_jax.train import (
    CompileProgress,
    compilation_cache,
    load_as,
    rare_collections,
    stop_signals,
)

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
        help="one prompt per line; or, in FILE.jsonl, objects with a prompt and "
        "optionally max_tokens, temperature and seed (default: standard input)",
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="folder of the training run whose latest checkpoint is served",
    )
    weights.add_argument(
        "--pretrained",
        type=Path,
        metavar="FOLDER",
        help="Hugging Face folder of the published model that is served; the config's "
        "architecture is DeepSeekConfig.from_pretrained of it",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=64,
        metavar="N",
        help="most tokens to generate for a prompt (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token each time (%(default)g)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the draws (%(default)s)"
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="write metrics to FILE at the end, as text for Prometheus",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="write a profile of the first prompts that are served together to FOLDER; "
        "`trace FOLDER` reads it",
    )
    add_no_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Serves as `add_arguments` describes.

    Returns:
      The exit status: 1 if a prompt was refused, while the others are still served, or
      if SIGTERM or SIGINT ended the serving before all prompts were.

    Raises:
      ValueError: bad input. It is raised before anything compiles, except for a file
        without prompts.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config = load_as(ServeConfig, args.config)
    defaults = {name: getattr(args, name) for name in _OPTIONS}
    check_options(**defaults)
    number = num_refused = num_left = 0
    cache = compilation_cache(console.print, enabled=not args.no_cache)
    with cache, _opened(args.prompts) as file:
        # Typed prompts are answered line by line; piped ones are served together.
        groups = ([line] for line in file) if file.isatty() else [list(file)]
        with rare_collections():
            engine = _start(config, args, console)
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
                with profiled, stop_signals() as received:
                    left = stream(engine.run(), config, texts, sys.stdout, received)
                profiled = contextlib.nullcontext()
                if num_left := len(left):
                    console.print(
                        f"{received[0]}: {len(texts) - num_left} of {len(texts)} "
                        f"prompts are complete; serve the last {num_left} again"
                    )
                    break
    if number == 0:
        raise ValueError(f"{args.prompts} holds no prompt; write one per line.")
    console.print(summary(engine.metrics()))
    if args.metrics is not None:
        args.metrics.write_text(prometheus(engine.metrics()))
    return 1 if num_refused or num_left else 0


def _start(config: ServeConfig, args: argparse.Namespace, console: Console) -> Engine:
    """Returns a compiled engine, with a run's experts placed for its observed load."""
    mesh, placement = make_serve_mesh(config), None
    if args.pretrained is not None:
        params = load_published(config, args.pretrained, mesh=mesh)
    else:
        params, placement = load_checkpoint(
            config, args.run, mesh=mesh, say=console.print, is_placed=True
        )
    engine = Engine(config, params, mesh=mesh, placement=placement)
    with CompileProgress(console) as progress:
        engine.compile(progress)
        compile_s = progress.elapsed_s
    console.print(
        f"{config.name}: {config.num_devices} devices; compiled in {compile_s:.0f} s"
    )
    return engine


def stream(
    tokens: Iterable[Token],
    config: ServeConfig,
    texts: Mapping[int, str],
    out: TextIO,
    received: Sequence[str] = (),
) -> list[int]:
    """Writes prompts with their completions, in the order of the prompts.

    The first unfinished request is written token by token. Those after it are computed
    at the same time, and written when their turn comes.

    Args:
      tokens: of all requests, as `Engine.run` yields them.
      config: the engine's.
      texts: the prompt of each request.
      out: where to.
      received: once it has an item, such as the name of a signal, this ends: the
        line of the request that is being written is ended where it is.

    Returns:
      The requests whose completions are not written, or not whole.
    """
    held: dict[int, list[Token]] = {request: [] for request in texts}
    turns = iter(texts)
    begun: set[int] = set()
    turn, decode = next(turns, None), _decoder(config)
    for token in tokens:
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
        if received and turn is not None:
            out.write("\n" * (turn in begun))
            out.flush()
            return [turn, *turns]
        out.flush()
    return []


def read_prompts(
    lines: Iterable[str], config: ServeConfig, defaults: dict[str, Any], name: str
) -> Iterator[dict[str, Any] | ValueError]:
    """Yields options for `Engine.submit` from each line, or an error about the line.

    Bytes of a line that are not UTF-8 are surrogates, as `_opened` reads them.
    """
    for line in lines:
        text = line.rstrip("\n")
        if not text:
            continue
        try:
            text.encode("utf-8", "surrogateescape").decode("utf-8")
            options: dict[str, Any] = {"prompt": text}
            if name.endswith(".jsonl"):
                options = _read_object(text)
            options["prompt"] = as_tokens(config, options["prompt"])
            yield defaults | options
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            yield ValueError(f"{text[:40]!r} is not UTF-8 ({error.reason}).")
        except ValueError as error:
            yield error
        except RecursionError:
            yield ValueError(f"{text[:40]!r} is nested too deeply.")


def _read_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text[:60]!r} is not JSON ({error}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError(f'{text[:60]!r} must be an object with "prompt": "...".')
    if unknown := found.keys() - {"prompt", *_OPTIONS}:
        raise ValueError(
            f"{sorted(unknown)[0]!r} is unknown; use prompt, {', '.join(_OPTIONS)}."
        )
    for option in _OPTIONS:
        kinds = (int, float) if option == "temperature" else (int,)
        if option in found and type(found[option]) not in kinds:
            raise ValueError(f"{option}={found[option]!r} must be a number.")
    return found


def as_tokens(config: ServeConfig, text: str) -> list[int]:
    """Returns a prompt's bytes; for a larger vocabulary, the numbers it consists of.

    Raises:
      ValueError: the vocabulary is larger, and the prompt is not made of numbers.
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
    """Inverts `as_tokens`."""
    return _decoder(config)(tokens, True)


def _decoder(config: ServeConfig) -> Callable[[list[int], bool], str]:
    """Returns a function from tokens, and whether they are the last, to text.

    It is called with a few tokens at a time. Bytes that are not UTF-8 become U+FFFD.
    """
    if config.architecture.vocab_size == 256:
        # A character of several bytes is written when all of them are there.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda tokens, is_last: decoder.decode(bytes(tokens), is_last)
    return lambda tokens, is_last: "".join(f"{token} " for token in tokens)


def summary(metrics: dict[str, float]) -> str:
    """Returns what was served, in one line."""
    return (
        f"{metrics['num_tokens']:.0f} tokens in {metrics['num_prefills']:.0f} prefills "
        f"and {metrics['num_decode_steps']:.0f} decode steps, "
        f"{metrics['tokens_per_s']:.0f} tokens/s; balancedness "
        f"{metrics['balancedness']:.3f} (worst layer "
        f"{metrics['balancedness_worst']:.3f}) after {metrics['num_moves']:.0f} moves"
    )


@contextlib.contextmanager
def _opened(name: str) -> Iterator[TextIO]:
    # Bytes that are not UTF-8 concern their own line only; see `read_prompts`.
    if name == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdin
    else:
        with Path(name).open(encoding="utf-8", errors="surrogateescape") as file:
            yield file
