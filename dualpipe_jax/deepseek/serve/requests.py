"""Requests: what is asked for, what is refused, and what a prefill is given of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from dualpipe_jax.deepseek.serve.config import ServeConfig
from dualpipe_jax.deepseek.serve.forward import Prompts, Sampling
from dualpipe_jax.deepseek.serve.prompts import Halves, as_arrays


class Slot(NamedTuple):
    """Where a request stands in the arrays of the state, [halves, requests].

    Attributes:
      half: 0 or 1.
      column: over all devices.
    """

    half: int
    column: int


@dataclasses.dataclass(eq=False)
class Request:
    """A request and how far it is; see `Engine.submit`.

    Attributes:
      number: its id.
      prompt: [n] int32.
      max_tokens: to write at most.
      temperature: 0 takes the likeliest token.
      seed: of what is drawn.
      stop_token: ends it.
      num_written: tokens so far.
      slot: None while it waits.
    """

    number: int
    prompt: np.ndarray
    max_tokens: int
    temperature: float
    seed: int
    stop_token: int | None
    num_written: int = 0
    slot: Slot | None = None

    def write(self, token: int) -> bool:
        """Counts a token; returns whether it is the last."""
        self.num_written += 1
        return token == self.stop_token or self.num_written >= self.max_tokens


def as_prompt(config: ServeConfig, prompt: ArrayLike, max_tokens: int) -> np.ndarray:
    """A prompt as [n] int32.

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
            f"model's are from 0 to {vocabulary - 1}; use its own vocabulary."
        )
    if tokens.size > config.max_prompt:
        raise ValueError(
            f"prompt has {tokens.size} tokens, but prompt_length={config.max_prompt}; "
            "shorten it."
        )
    if not isinstance(max_tokens, (int, np.integer)) or max_tokens < 1:
        raise ValueError(f"{max_tokens=} must be an integer, at least 1.")
    if tokens.size + max_tokens > config.context_length:
        raise ValueError(
            f"the prompt's {tokens.size} tokens and {max_tokens=} do not fit "
            f"context_length={config.context_length}; ask for fewer."
        )
    return tokens.astype(np.int32)


def check_options(temperature: float, seed: int) -> None:
    """Raises a ValueError for options of `Engine.submit` that are none."""
    try:
        is_number = math.isfinite(np.float32(temperature)) and temperature >= 0
    except (TypeError, ValueError, OverflowError):
        is_number = False
    if not is_number:
        raise ValueError(f"{temperature=} must be a number, at least 0.")
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**31:
        raise ValueError(f"{seed=} must be an integer from 0 to 2^31 - 1.")


class Admitted(NamedTuple):
    """The requests that begin on one device, and where their prompts are computed.

    Attributes:
      requests: each has its slot.
      halves: of their prompts.
    """

    requests: list[Request]
    halves: Halves


def prefill_arrays(
    config: ServeConfig, admitted: Sequence[Admitted], half: int
) -> tuple[Prompts, list[Request | None]]:
    """One microbatch of a prefill, of all devices.

    Args:
      config: of the server.
      admitted: by device.
      half: which microbatch.

    Returns:
      prompts: NumPy arrays over all devices.
      ending: for each row the request whose first token it gives, or None.
    """
    per_half = config.requests_per_device // 2
    of_row: list[Request | None] = []
    parts = []
    for own, halves in admitted:
        prompts = [request.prompt for request in own]
        part = as_arrays(halves[half], prompts, config.tokens_a_prefill // 2)
        of_row += [None if number < 0 else own[number] for number in part.prompts]
        parts.append(part)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    def slot(request: Request | None) -> int:
        """On its device."""
        if request is None or request.slot is None:
            return -1
        return request.slot.half * per_half + request.slot.column % per_half

    last = joined("last")
    prompts = Prompts(
        tokens=joined("tokens"),
        positions=joined("positions"),
        rows=joined("rows"),
        slots=np.array([slot(request) for request in of_row], np.int32),
        last=last,
        sampling=Sampling(
            np.array([r.temperature if r else 0.0 for r in of_row], np.float32),
            np.array([r.seed if r else 0 for r in of_row], np.int32),
        ),
    )
    ending = [r if at >= 0 else None for r, at in zip(of_row, last, strict=True)]
    return prompts, ending
