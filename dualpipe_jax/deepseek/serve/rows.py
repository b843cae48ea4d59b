"""Packed tokens of prompts to rows of one prompt each, and back.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dualpipe_jax.deepseek.serve.arrays import NOWHERE, Prompts
from eplb_jax.placement import take_or_zero


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
    def of(cls, prompts: Prompts, num_positions: int) -> Rows:
        """Returns the rows of some prompts, of `num_positions` positions each."""
        num_rows, num_tokens = len(prompts.request_slots), len(prompts.tokens)
        place_M = prompts.rows * num_positions + prompts.positions
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
