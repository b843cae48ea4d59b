"""Requests, and the checks of what a user may ask for."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from dualpipe_jax.deepseek.serve.arrays import MAX_TOP
from dualpipe_jax.deepseek.serve.config import ServeConfig
from eplb_jax.placement import is_count


class RequestSlot(NamedTuple):
    """Place of a request in the state's arrays, [halves, requests].

    Attributes:
      half: 0 or 1.
      column: over all devices.
    """

    half: int
    column: int


@dataclasses.dataclass(eq=False)
class Request:
    """A request and its progress; see `Engine.submit`.

    Attributes:
      number: its id.
      prompt: [n] int32.
      max_tokens: most tokens to generate.
      temperature: 0 takes the most likely token.
      seed: of the draws.
      top_p: draws are from the most likely tokens that add up to this probability.
      num_logprobs: most likely tokens to report with each token; None: not even the
        log probability of the token itself.
      stop_tokens: tokens that end it.
      num_prefilled: tokens of the prompt that have been computed, or that a step is
        computing.
      num_started: tokens that have been computed, or that a step is computing.
      num_generated: those that the host has read.
      request_slot: None while it waits, and when all of its tokens are started.
      is_ended: whether it is finished or cancelled; a step may still compute a token.
    """

    number: int
    prompt: np.ndarray
    max_tokens: int
    temperature: float
    seed: int
    top_p: float
    num_logprobs: int | None
    stop_tokens: frozenset[int]
    num_prefilled: int = 0
    num_started: int = 0
    num_generated: int = 0
    request_slot: RequestSlot | None = None
    is_ended: bool = False

    @property
    def is_prefilled(self) -> bool:
        """Whether all of the prompt is computed, or will be by the last step."""
        return self.num_prefilled == len(self.prompt)

    def add(self, token: int) -> bool:
        """Counts a generated token; returns whether it is the last."""
        self.num_generated += 1
        return token in self.stop_tokens or self.num_generated >= self.max_tokens


def as_prompt(config: ServeConfig, prompt: ArrayLike, max_tokens: int) -> np.ndarray:
    """Returns a prompt as [n] int32.

    Raises:
      ValueError: it is empty, too long for the server, or of another vocabulary.
    """
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"prompt has shape {tokens.shape} and dtype {tokens.dtype}; it must be one "
            "token or more, integers in one axis."
        )
    vocabulary = config.architecture.vocab_size
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"prompt holds tokens from {tokens.min()} to {tokens.max()}, but the "
            f"model's are from 0 to {vocabulary - 1}; use the model's vocabulary."
        )
    if tokens.size > config.max_prompt_length:
        raise ValueError(
            f"prompt has {tokens.size} tokens, but max_prompt_length="
            f"{config.max_prompt_length}; shorten it."
        )
    if tokens.size + max_tokens > config.context_length:
        raise ValueError(
            f"the prompt's {tokens.size} tokens and {max_tokens=} do not fit "
            f"context_length={config.context_length}; lower max_tokens."
        )
    return tokens.astype(np.int32)


def check_options(
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    top_p: float = 1.0,
    num_logprobs: int | None = None,
) -> None:
    """Raises a ValueError for an invalid option of `Engine.submit`."""
    if not is_count(max_tokens):
        raise ValueError(f"{max_tokens=} must be an integer, at least 1.")
    if not _is_finite(temperature) or temperature < 0:
        raise ValueError(f"{temperature=} must be a finite number, at least 0.")
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**31:
        raise ValueError(f"{seed=} must be an integer from 0 to 2^31 - 1.")
    if not _is_finite(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must be a number above 0, at most 1.")
    if num_logprobs is None:
        return
    if not isinstance(num_logprobs, (int, np.integer)) or (
        not 0 <= num_logprobs <= MAX_TOP
    ):
        raise ValueError(f"{num_logprobs=} must be an integer from 0 to {MAX_TOP}.")


def _is_finite(value: float) -> bool:
    try:
        with np.errstate(over="ignore"):
            return math.isfinite(np.float32(value))
    except (TypeError, ValueError, OverflowError):
        return False
