"""Rotary positions, and YaRN, which stretches them over longer sequences.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax.checked import Count, Range, check_fields

Positive = Annotated[float, Range(0, above=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN (arXiv:2309.00071): rotary positions beyond the length of the pretraining.

    Pairs that turn many times within the pretraining's length keep their frequency,
    those that turn less than once are slowed down by `factor`, and those between are
    mixed. Fields are named as in `rope_scaling` of a published `config.json`.

    Attributes:
      factor: how many times as long sequences may be; at least 1.
      original_max_position_embeddings: sequence length of the pretraining.
      beta_fast: turns within that length from which on a pair keeps its frequency.
      beta_slow: turns up to which a pair is slowed down by all of `factor`.
      mscale: with `mscale_all_dim`, scales the rotated parts of queries and keys by
        the ratio of the two temperatures; None or 0: see `attention_factor`.
      mscale_all_dim: scales the attention's scores by the square of its temperature;
        None or 0: not.
      attention_factor: scales the rotated parts; None: what `mscale` and
        `mscale_all_dim` give, or the temperature 0.1 ln(factor) + 1 without them.
      truncate: whether the bounds between the kinds of pairs are whole pairs.

    Raises:
      ValueError: a value that is out of range.

    Examples:
      >>> yarn = RopeScaling(
      ...     factor=40.0, original_max_position_embeddings=4096, mscale=1.0,
      ...     mscale_all_dim=1.0,
      ... )
      >>> yarn.rotation_scale, round(yarn.score_scale, 4)
      (1.0, 1.8739)
      >>> slower = yarn.frequencies(10_000.0, 64) / frequencies(10_000.0, 64)
      >>> slower[::15].round(3).tolist()
      [1.0, 0.625, 0.025...]
    """

    factor: Annotated[float, Range(1)]
    original_max_position_embeddings: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Annotated[float, Range(0)] | None = None
    mscale_all_dim: Annotated[float, Range(0)] | None = None
    attention_factor: Positive | None = None
    truncate: bool = True

    def __post_init__(self):
        check_fields(self)
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"{self.beta_fast=} must be at least {self.beta_slow=}.")

    def frequencies(self, base: float, width: int) -> np.ndarray:
        """Returns what each pair turns by in a position, [width / 2] float32."""
        length = self.original_max_position_embeddings

        def pair_of(turns: float) -> float:
            """The pair that turns so often within the pretraining's length."""
            return width * math.log(length / (2 * math.pi * turns)) / 2 / math.log(base)

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # As published, the upper bound counts channels and not pairs.
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001
        plain = base ** -(np.arange(0, width, 2) / width)
        slow = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
        return (plain * (1 - slow) + plain / self.factor * slow).astype(np.float32)

    @property
    def rotation_scale(self) -> float:
        """Factor of the rotated parts of queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(
                self.mscale_all_dim
            )
        return self._temperature(1.0)

    @property
    def score_scale(self) -> float:
        """Factor of the attention's scores."""
        return self._temperature(self.mscale_all_dim or 0.0) ** 2

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


def frequencies(base: float, width: int) -> jax.Array:
    """Returns what each pair turns by in a position, [width / 2] float32."""
    half = width // 2
    return base ** -(jnp.arange(half, dtype=jnp.float32) / half)


def rotate(
    x_BTHR: jax.Array,
    positions_BT: jax.Array,
    base: float,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Applies rotary position embeddings (Su et al. 2021), pairing neighbors.

    Args:
      x_BTHR: [batch, sequence, heads, R], R even.
      positions_BT: [batch, sequence] int32.
      base: the slowest pair rotates by about 1 / base per position.
      scaling: None: positions are not stretched.

    Returns:
      Like `x_BTHR`; angles are computed in float32.

    Examples:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> rotate(x, jnp.array([[0, 1]]), 10_000.0)[0, :, 0].round(3).tolist()
      [[1.0, 1.0], [-0.30..., 1.38...]]
    """
    width = x_BTHR.shape[-1]
    frequency, scale = frequencies(base, width), 1.0
    if scaling is not None:
        frequency = jnp.asarray(scaling.frequencies(base, width))
        scale = scaling.rotation_scale
    angle = positions_BT[..., None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    pairs = x_BTHR.astype(jnp.float32).reshape(*x_BTHR.shape[:-1], width // 2, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.reshape(x_BTHR.shape).astype(x_BTHR.dtype)
