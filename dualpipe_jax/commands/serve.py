"""`python -m dualpipe_jax serve`: writes completions as it computes them, or serves."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

from dualpipe_jax.commands.arguments import add_no_cache
from dualpipe_jax.commands.prompts import OPTIONS, read_prompts
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
from dualpipe_jax.processes import handled
from dualpipe_jax.profiles import profile
from dualpipe_jax.tokens import (
    ByteTokenizer,
    NumberTokenizer,
    PublishedTokenizer,
    Tokenizer,
    has_tokenizer,
)
from dualpipe_jax.train import (
    TOKENIZER,
    CompileProgress,
    compilation_cache,
    load_as,
    rare_collections,
    stop_signals,
)


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
        help="one prompt per line; or, in FILE.jsonl, objects with a prompt, or "
        "messages for the chat template, and optionally max_tokens, temperature, "
        "top_p and seed (default: standard input)",
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
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="with tokenizer.json (default: the model's own folder; without one, bytes "
        "for a vocabulary of 256, else numbers)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="each line is a user's message, and the model's reply is written",
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
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens that add up to this probability only "
        "(%(default)g)",
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
    _add_http_arguments(parser)
    add_no_cache(parser)


def _add_http_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "HTTP",
        "Clients send their own prompts and options, in the form of OpenAI's API.",
    )
    group.add_argument(
        "--http", type=int, metavar="PORT", help="serve over HTTP; 0 takes a free port"
    )
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen (%(default)s: this machine only)",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="the bearer token that clients must send; @FILE reads it from a file",
    )
    group.add_argument(
        "--model-name", metavar="NAME", help="name for clients (the config's)"
    )
    group.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        metavar="N",
        help="most requests that wait for others; more are refused (%(default)s)",
    )
    group.add_argument(
        "--max-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="longest time of a request (%(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Serves as `add_arguments` describes.

    Returns:
      The exit status: 1 if a prompt was refused, while the others are still served, or
      if SIGTERM or SIGINT ended the serving before all prompts were; with `--http`, if
      a second signal did before all requests were finished.

    Raises:
      ValueError: bad input. It is raised before anything compiles, except for a file
        without prompts.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config = load_as(ServeConfig, args.config)
    defaults = {name: getattr(args, name) for name in OPTIONS}
    check_options(**defaults)
    tokenizer = choose_tokenizer(config, args)
    if args.http is not None:
        from dualpipe_jax.commands.http import serve_over_http

        start = functools.partial(_start, config, args, console)
        return serve_over_http(args, start, tokenizer, config.name, console)
    number = num_refused = num_left = 0
    cache = compilation_cache(console.print, enabled=not args.no_cache)
    with cache, _opened(args.prompts) as file:
        # Typed prompts are answered line by line; piped ones are served together.
        groups = ([line] for line in file) if file.isatty() else [list(file)]
        with _ended_by_sigterm(console):
            engine = _start(config, args, console)
        profiled = contextlib.nullcontext()
        if args.profile is not None:
            profiled = profile(args.profile, *engine.programs.compiled)
        for lines in groups:
            texts: dict[int, str] = {}
            prompts = read_prompts(
                lines, tokenizer, defaults, args.prompts, is_chat=args.chat
            )
            for found in prompts:
                number += 1
                try:
                    if isinstance(found, ValueError):
                        raise found
                    request = engine.submit(
                        **found.options, stop_tokens=tokenizer.stop_tokens
                    )
                except ValueError as error:
                    console.print(f"prompt {number} is refused: {error}", markup=False)
                    num_refused += 1
                else:
                    texts[request] = found.shown
            if texts:
                with profiled, stop_signals() as received:
                    left = stream(engine.run(), tokenizer, texts, sys.stdout, received)
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


def choose_tokenizer(config: ServeConfig, args: argparse.Namespace) -> Tokenizer:
    """The tokenizer that the arguments name, or the model's own.

    Raises:
      ImportError: the package tokenizers is not installed.
      ValueError: there is none, its vocabulary is larger than the model's, or it has no
        chat template, but `--chat` needs one.
    """
    vocab_size, folder = config.architecture.vocab_size, args.tokenizer
    if folder is None:
        own = args.pretrained if args.run is None else args.run / TOKENIZER
        folder = own if has_tokenizer(own) else None
    if folder is not None:
        tokenizer = PublishedTokenizer(folder)
    else:
        tokenizer = ByteTokenizer() if vocab_size == 256 else NumberTokenizer()
    tokenizer.check_fits(vocab_size)
    if args.chat:
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    return tokenizer


@contextlib.contextmanager
def _ended_by_sigterm(console: Console) -> Iterator[None]:
    """Ends the process in a block in which nothing is served yet."""

    def end(number: int, restore: Callable[[], None]) -> None:
        restore()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        console.print("SIGTERM: no prompt was served, the model was still loading")
        # Programs that compile in other threads cannot be interrupted.
        os._exit(1)

    with handled(end):
        yield


def _start(config: ServeConfig, args: argparse.Namespace, console: Console) -> Engine:
    """Returns a compiled engine, with a run's experts placed for its observed load."""
    with rare_collections():
        return _load(config, args, console)


def _load(config: ServeConfig, args: argparse.Namespace, console: Console) -> Engine:
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
    tokenizer: Tokenizer,
    texts: Mapping[int, str],
    out: TextIO,
    received: Sequence[str] = (),
) -> list[int]:
    """Writes prompts with their completions, in the order of the prompts.

    The first unfinished request is written token by token. Those after it are computed
    at the same time, and written when their turn comes.

    Args:
      tokens: of all requests, as `Engine.run` yields them.
      tokenizer: of the model.
      texts: for each request, what is written before its completion.
      out: where to.
      received: once it has an item, such as the name of a signal, this ends: the
        line of the request that is being written is ended where it is.

    Returns:
      The requests whose completions are not written, or not whole.
    """
    held: dict[int, list[Token]] = {request: [] for request in texts}
    turns = iter(texts)
    begun: set[int] = set()
    turn, decode = next(turns, None), tokenizer.decoder()
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
            turn, decode = next(turns, None), tokenizer.decoder()
        if received and turn is not None:
            out.write("\n" * (turn in begun))
            out.flush()
            return [turn, *turns]
        out.flush()
    return []


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
