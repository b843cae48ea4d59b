"""Packed tokens of prompts to rows of one prompt each, and back.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualpipe_jax.deepseek.serve.arrays import NOWHERE, Prompts
from dualpipe_jax.deepseek.serve.config import HALVES
from eplb_jax.placement import take_or_zero


def place_in_half(slots: jax.Array, half: int, requests_per_device: int) -> jax.Array:
    """Returns the places of request slots of a device in a half of its cache.

    Args:
      slots: int32; -1 for none.
      half: which half.
      requests_per_device: request slots of both.

    Returns:
      Of the same shape; out of range for slots of the other half, and for none.

    Examples:
      >>> place_in_half(jnp.array([1, 3, -1]), 1, 4)[1].item()
      1
    """
    per_half = requests_per_device // HALVES
    return jnp.where(slots // per_half == half, slots % per_half, NOWHERE)


class Rows(NamedTuple):
    """Where the tokens of a microbatch are in rows of one prompt each.

    Only attention runs on rows, which short prompts leave partly empty.

    Attributes:
      token_BT: index of the token at each place of a row; out of range for none.
      place_M: place of each token in the rows, flattened; out of range for padding.
    """

    token_BT: jax.Array
    place_M: jax.Array

    @classmethod
    def of(
        cls, prompts: Prompts, num_positions: int, start_B: jax.Array | None = None
    ) -> Rows:
        """Returns the rows of some prompts.

        Args:
          prompts: the microbatch.
          num_positions: of each row.
          start_B: position of each row's first place; None: 0.
        """
        num_rows, num_tokens = len(prompts.request_slots), len(prompts.tokens)
        place_M = prompts.rows * num_positions + prompts.positions
        if start_B is not None:
            place_M -= take_or_zero(start_B, prompts.rows)
        place_M = jnp.where(prompts.rows < 0, NOWHERE, place_M)
        empty = jnp.full(num_rows * num_positions, num_tokens, jnp.int32)
        token = empty.at[place_M].set(
            jnp.arange(num_tokens, dtype=jnp.int32), mode="drop"
        )
        return cls(token.reshape(num_rows, num_positions), place_M)

    @property
    def is_token_BT(self) -> jax.Array:
        """Which places of the rows have a token."""
        return self.token_BT < len(self.place_M)

    @property
    def position_BT(self) -> jax.Array:
        """Positions of the rows' places in their prompts."""
        position_1T = jnp.arange(self.token_BT.shape[1], dtype=jnp.int32)[None]
        return jnp.broadcast_to(position_1T, self.token_BT.shape)

    def spread(self, x_M: jax.Array) -> jax.Array:
        """Moves values [M, ...] of tokens to rows; zeros where there is no token."""
        flat = take_or_zero(x_M, self.token_BT.reshape(-1))
        return flat.reshape(*self.token_BT.shape, *x_M.shape[1:])

    def gather(self, x_BT: jax.Array) -> jax.Array:
        """Moves values [B, T, ...] of rows to tokens; zeros for padding."""
        return take_or_zero(x_BT.reshape(-1, *x_BT.shape[2:]), self.place_M)


def start_and_stop(prompts: Prompts) -> tuple[jax.Array, jax.Array]:
    """Returns where the piece of each row starts and stops, [B] each; 0 if empty."""
    num_rows, rows = len(prompts.request_slots), prompts.rows
    rows = jnp.where(rows < 0, NOWHERE, rows)
    far = jnp.full(num_rows, NOWHERE, jnp.int32)
    start_B = far.at[rows].min(prompts.positions, mode="drop")
    stop_B = jnp.zeros(num_rows, jnp.int32)
    stop_B = stop_B.at[rows].max(prompts.positions + 1, mode="drop")
    return jnp.where(stop_B > 0, start_B, 0), stop_B
