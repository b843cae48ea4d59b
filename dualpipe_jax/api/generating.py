"""One request's completions: from engine tokens to pieces of text."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from dualpipe_jax.api.answers import Answer, Piece
from dualpipe_jax.api.errors import ApiError
from dualpipe_jax.api.fields import Generation
from dualpipe_jax.api.stops import StopFinder
from dualpipe_jax.api.worker import EngineWorker, Ticket
from dualpipe_jax.deepseek.serve import Engine, Token
from dualpipe_jax.tokens import Tokenizer


def engine_requests(
    generation: Generation, engine: Engine, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Returns the arguments of `Engine.submit` for each completion, checked.

    Args:
      generation: what a request asks for.
      engine: that will run it.
      tokenizer: of the model.

    Raises:
      ApiError: a prompt is empty, too long, or has tokens of another vocabulary, or an
        option is out of range.
    """
    seed = generation.seed
    if seed is None:
        seed = int(np.random.default_rng().integers(2**31 - generation.num_choices))
    requests = []
    for prompt in generation.prompts:
        for choice in range(generation.num_choices):
            most = max(1, engine.config.context_length - len(prompt))
            asked = generation.max_tokens
            request = {
                "prompt": prompt,
                "max_tokens": most if asked is None else asked,
                "temperature": generation.temperature,
                "top_p": generation.top_p,
                "num_logprobs": generation.num_logprobs,
                # Each completion of a prompt is another draw.
                "seed": seed + choice,
                "stop_tokens": tokenizer.stop_tokens,
            }
            try:
                engine.check(**request)
            except ValueError as error:
                raise _refusal(error) from None
            requests.append(request)
    return requests


def _refusal(error: ValueError) -> ApiError:
    """Returns the engine's error as the client's, with the field that it is about."""
    text = str(error)
    names = {"num_logprobs": "logprobs", "the": "max_tokens"}
    first = re.match(r"\w+", text)
    name = first[0] if first else ""
    return ApiError(400, text, param=names.get(name, name) or None)


class Completions:
    """The completions of one request, while the engine computes them.

    Use it in a `with` block: leaving it ends what is not finished, and frees the
    request slots.

    Attributes:
      received: of tokens and errors, as the worker puts them there.
      answer: counts the tokens.
    """

    def __init__(
        self,
        worker: EngineWorker,
        requests: list[dict[str, Any]],
        stops: tuple[str, ...],
        tokenizer: Tokenizer,
        answer: Answer,
        max_seconds: float,
    ):
        """Queues the requests.

        Raises:
          ApiError: see `EngineWorker.submit`.
        """
        self.received: asyncio.Queue[tuple[int, Token | ApiError]] = asyncio.Queue()
        self.answer = answer
        self._worker, self._stop_tokens = worker, frozenset(tokenizer.stop_tokens)
        self._tickets: list[Ticket] = worker.submit(requests, self.received)
        self._decoders = [tokenizer.decoder() for _ in requests]
        self._stops = [StopFinder(stops) for _ in requests]
        self._held: list[list[Token]] = [[] for _ in requests]
        self._num_left = len(requests)
        late = ApiError(504, f"The request took longer than {max_seconds:g} seconds.")
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max_seconds, self.fail, late)

    def __enter__(self) -> Completions:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        for ticket in self._tickets:
            self._worker.cancel(ticket)

    def fail(self, error: ApiError) -> None:
        """Ends the request with an error."""
        self.received.put_nowait((-1, error))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields pieces until all completions are finished.

        Raises:
          ApiError: the engine has failed, or the request took too long.
        """
        while self._num_left:
            index, item = await self.received.get()
            if isinstance(item, ApiError):
                raise item
            if (piece := self._add(index, item)) is not None:
                yield piece

    def _add(self, index: int, token: Token) -> Piece | None:
        finder = self._stops[index]
        if finder.is_found:
            return None  # of the step that ran when the stop was found
        self.answer.num_generated += 1
        text = self._decoders[index]([token.token], token.is_last)
        text = finder.add(text, token.is_last)
        self._held[index].append(token)
        is_last = token.is_last or finder.is_found
        if not text and not is_last:
            return None  # of a character, or perhaps of a stop, that is not whole
        reason = None
        if is_last:
            self._num_left -= 1
            self._worker.cancel(self._tickets[index])
            is_stop = finder.is_found or token.token in self._stop_tokens
            reason = "stop" if is_stop else "length"
        held, self._held[index] = tuple(self._held[index]), []
        return Piece(index, text, held, reason)
