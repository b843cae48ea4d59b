"""`serve --http`: the same model for clients of an API."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from dualpipe_jax.api import Api, Limits, bind, serve
from dualpipe_jax.deepseek.serve import Engine
from dualpipe_jax.tokens import Tokenizer
from dualpipe_jax.train import compilation_cache


def serve_over_http(
    args: argparse.Namespace,
    start: Callable[[], Engine],
    tokenizer: Tokenizer,
    name: str,
    console: Console,
) -> int:
    """Serves until SIGTERM or SIGINT, after which what runs is finished.

    Args:
      args: of `serve`.
      start: loads and compiles the engine.
      tokenizer: of the model.
      name: of the config.
      console: for messages.

    Returns:
      The exit status: 1 if requests were left unfinished.

    Raises:
      ValueError: bad options, a port that is in use, or what `start` raises.
    """
    if args.prompts != "-" or args.profile is not None or args.metrics is not None:
        raise ValueError(
            "--http takes prompts from clients, and has its metrics at /metrics; leave "
            "FILE, --profile and --metrics out."
        )
    if args.max_waiting < 0 or not args.max_seconds > 0:
        raise ValueError(
            f"--max-waiting {args.max_waiting} must be at least 0, and --max-seconds "
            f"{args.max_seconds:g} above 0."
        )
    limits = Limits(max_waiting=args.max_waiting, max_seconds=args.max_seconds)
    model = args.model_name or name
    key = _read_key(args.api_key)
    bound = bind(args.host, args.http)
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start_and_say() -> Engine:
        engine = start()
        console.print(f"{model} is ready at {url}/v1")
        return engine

    api = Api(start_and_say, tokenizer, model, limits=limits, api_key=key)
    console.print(f"{url}/health answers; {model} is loading")
    with compilation_cache(console.print, enabled=not args.no_cache):
        status = serve(api, bound, console.print)
    if api.worker.engine is None:
        # Programs that compile in other threads cannot be interrupted.
        sys.stdout.flush()
        os._exit(status)
    return status


def _read_key(key: str | None) -> str | None:
    if key is not None and key.startswith("@"):
        key = Path(key[1:]).read_text(encoding="utf-8").strip()
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise ValueError("--api-key must be printable ASCII, and not empty.")
    return key
