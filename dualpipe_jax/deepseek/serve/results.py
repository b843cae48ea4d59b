"""What steps return to the host: tokens of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dualpipe_jax.deepseek.serve.arrays import Chosen
from dualpipe_jax.deepseek.serve.requests import Request


class Token(NamedTuple):
    """One generated token of a request.

    Attributes:
      request: the id that `submit` returned.
      token: the token.
      is_last: whether the request is finished.
      logprob: its log probability by the model, before any temperature, if the request
        has asked for it.
      top_logprobs: the most likely tokens in order, each with its log probability, as
        many as the request has asked for.
    """

    request: int
    token: int
    is_last: bool
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Step(NamedTuple):
    """A step that the device runs, or will.

    Attributes:
      places: requests that get a token, each with its place in `chosen`.
      chosen: [2, B], on the device.
    """

    places: Sequence[tuple[tuple[int, int], Request]]
    chosen: Chosen

    def read(self) -> list[tuple[Request, Token]]:
        """Waits for the step; returns the tokens of requests that have not ended."""
        places = [each for each in self.places if not each[1].is_ended]
        if not places:
            jax.block_until_ready(self.chosen)
            return []
        if any(request.num_logprobs is not None for _, request in places):
            chosen = jax.tree.map(np.asarray, self.chosen)
        else:
            chosen = self.chosen._replace(tokens=np.asarray(self.chosen.tokens))
        return [(request, _token(request, place, chosen)) for place, request in places]


def _token(request: Request, place: tuple[int, int], chosen: Chosen) -> Token:
    token = int(chosen.tokens[place])
    own = Token(request.number, token, request.add(token))
    if (number := request.num_logprobs) is None:
        return own
    likely = chosen.top_tokens[place], chosen.top_logprobs[place]
    pairs = zip(*(each[:number].tolist() for each in likely), strict=True)
    logprob = float(chosen.logprobs[place])
    return own._replace(logprob=logprob, top_logprobs=tuple(pairs))
