"""Ids of experts in the choices of tokens: unknown ones, and repeated ones.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def known_ids(ids: ArrayLike, num_ids: int) -> jax.Array:
    """Replaces ids that are out of range by -1, which stands for no choice.

    Args:
      ids: [...] integers.
      num_ids: logical or physical experts.

    Returns:
      [...] int32; -1 for each id outside [0, num_ids).

    Examples:
      >>> known_ids(jnp.array([0, 3, -7, 2]), 3).tolist()
      [0, -1, -1, 2]
    """
    ids = jnp.asarray(ids)
    if ids.dtype.itemsize < 8:
        # A narrow dtype cannot hold `num_ids`; an unsigned -1 becomes -1.
        ids = ids.astype(jnp.int32)
    is_known = (ids >= 0) & (ids < num_ids)
    return jnp.where(is_known, ids.astype(jnp.int32), -1)


def is_repeated(ids_TK: jax.Array) -> jax.Array:
    """Tells which choices of a token repeat an earlier choice of that token.

    Args:
      ids_TK: [tokens, top_k] int32.

    Returns:
      [tokens, top_k] bool.

    Examples:
      >>> is_repeated(jnp.array([[2, 2, 0], [1, 0, 1]])).tolist()
      [[False, True, False], [False, False, True]]
    """
    is_before_KK = np.tri(ids_TK.shape[1], k=-1, dtype=bool)
    return (_is_same(ids_TK) & is_before_KK[None]).any(axis=2)


def merge_repeated(
    ids_TK: jax.Array, weights_TK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Makes one choice of all choices of one expert by a token.

    Args:
      ids_TK: [tokens, top_k] int32; -1 for no choice.
      weights_TK: [tokens, top_k] floating point; zero where `ids_TK` is -1.

    Returns:
      ids: [tokens, top_k] int32, -1 in place of each repeated id.
      weights: [tokens, top_k], the sum over equal choices; zero where `ids` is -1.

    Examples:
      >>> ids, weights = merge_repeated(jnp.array([[2, 2]]), jnp.array([[1.0, 3.0]]))
      >>> ids.tolist(), weights.tolist()
      ([[2, -1]], [[4.0, 0.0]])
    """
    is_again_TK = is_repeated(ids_TK)
    sums_TK = jnp.where(_is_same(ids_TK), weights_TK[:, None], 0.0).sum(axis=2)
    return jnp.where(is_again_TK, -1, ids_TK), jnp.where(is_again_TK, 0.0, sums_TK)


def _is_same(ids_TK: jax.Array) -> jax.Array:
    """[tokens, top_k, top_k] bool, whether two choices of a token are equal."""
    return ids_TK[:, :, None] == ids_TK[:, None]
