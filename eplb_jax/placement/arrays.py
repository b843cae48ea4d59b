"""Gathers and scatters of known indices, and arithmetic that is safe everywhere.

Shape suffixes: see `eplb_jax`; here also Y entries of another row.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def take(value: jax.Array, index: jax.Array) -> jax.Array:
    """Takes `value[index]` of a flat array, for indices known to be inside.

    Args:
      value: [n].
      index: [...] int32, in [0, n).

    Returns:
      [...], like `value`.

    Examples:
      >>> take(jnp.array([7, 8, 9]), jnp.array([[2, 0]])).tolist()
      [[9, 7]]
    """
    return value.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def take_or_zero(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Takes `rows[index]`, and zeros where there is no such row.

    Args:
      rows: [n, ...].
      index: [m] int32; there is no row below 0 or from n on.

    Returns:
      [m, ...], like `rows`.

    Examples:
      >>> take_or_zero(jnp.array([7, 8, 9]), jnp.array([2, -1, 3])).tolist()
      [9, 0, 0]
      >>> take_or_zero(jnp.zeros((0, 2)), jnp.array([0])).tolist()
      [[0.0, 0.0]]
    """
    if not len(rows):
        # jax refuses to take a row from none, even if no index asks for one.
        rows = jnp.pad(rows, [(0, 1)] + [(0, 0)] * (rows.ndim - 1))
    return rows.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.jit
def put(value: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """Puts `new` at `value[index]`, flat, for distinct indices known to be inside.

    Args:
      value: [n].
      index: [...] int32, in [0, n), each once.
      new: [...], like `value`.

    Returns:
      [n].

    Examples:
      >>> put(jnp.array([7, 8, 9]), jnp.array([2, 0]), jnp.array([1, 2])).tolist()
      [2, 8, 1]
    """
    return value.at[index].set(
        new,
        mode="promise_in_bounds",
        unique_indices=True,
        wrap_negative_indices=False,
    )


@jax.jit
def take_rows(value_AX: jax.Array, index_AY: jax.Array) -> jax.Array:
    """Takes `value[r, index[r, m]]` for each r and m, indices known to be inside.

    Args:
      value_AX: [rows, n].
      index_AY: [rows, m] int32.

    Returns:
      [rows, m], like `value_AX`.

    Examples:
      >>> take_rows(jnp.array([[7, 8], [5, 6]]), jnp.array([[1, 1], [0, 1]])).tolist()
      [[8, 8], [5, 6]]
    """
    return take(value_AX.reshape(-1), in_rows(index_AY, value_AX.shape[1]))


@jax.jit
def invert(order_AX: jax.Array, value_AX: jax.Array) -> jax.Array:
    """Puts `value[r, n]` at `[r, order[r, n]]`, for rows that are permutations.

    Args:
      order_AX: [rows, n] int32, each row a permutation.
      value_AX: [rows, n].

    Returns:
      [rows, n], like `value_AX`.

    Examples:
      >>> invert(jnp.array([[2, 0, 1]]), jnp.array([[7, 8, 9]])).tolist()
      [[8, 9, 7]]
    """
    index_AX = in_rows(order_AX, order_AX.shape[1])
    flat = jnp.zeros(value_AX.size, value_AX.dtype)
    return put(flat, index_AX, value_AX).reshape(value_AX.shape)


def count_replicas(expert_S: jax.Array, num_experts: int) -> jax.Array:
    """Counts how many physical experts each expert has.

    Args:
      expert_S: [...] int32, -1 if empty.
      num_experts: logical experts.

    Returns:
      [num_experts] int32.

    Examples:
      >>> count_replicas(jnp.array([2, 0, 2, -1]), 4).tolist()
      [1, 0, 2, 0]
    """
    is_filled_S = (expert_S >= 0).astype(jnp.int32)
    return jnp.zeros(num_experts, jnp.int32).at[expert_S].add(is_filled_S)


@jax.jit
def divide(load: jax.Array, count: jax.Array) -> jax.Array:
    """Divides in float32, rounded as IEEE 754 says, on every backend.

    XLA:GPU's own float32 division may be off by two units in the last place, which
    can reverse a comparison. A float64 quotient of float32 values, rounded to
    float32, is the correctly rounded one (53 >= 2 * 24 + 2 bits).

    Args:
      load: [...] float32.
      count: [...] integers, not zero.

    Returns:
      [...] float32.

    Examples:
      >>> divide(jnp.array([1.0, 2.0]), jnp.array([3, 4])).tolist()
      [0.3333333432674408, 0.5]
    """
    with jax.enable_x64(True):
        quotient = load.astype(jnp.float64) / count.astype(jnp.float64)
        return quotient.astype(jnp.float32)


def add_saturating(total: jax.Array, more: jax.Array) -> jax.Array:
    """Adds to a counter that stays at its largest value instead of wrapping.

    Args:
      total: [] int32, not negative.
      more: [] int32, not negative.

    Returns:
      [] int32.

    Examples:
      >>> int(add_saturating(jnp.int32(2**31 - 3), jnp.int32(5)))
      2147483647
    """
    return total + jnp.minimum(more, jnp.iinfo(total.dtype).max - total)


def put_like(value: ArrayLike, like: jax.Array) -> jax.Array:
    """Puts values where another array is, so that it can take its place in a program.

    Args:
      value: of any shape; known.
      like: an array, known.

    Returns:
      An array like `value`, with the sharding of `like` if that is committed to it.

    Examples:
      >>> put_like(jnp.ones(2), like=jnp.zeros(2)).committed
      False
    """
    if like.committed:
        return jax.device_put(value, like.sharding)
    return jnp.asarray(value)


def in_rows(index_AX: jax.Array, row_size: int) -> jax.Array:
    """Turns indices into rows into indices into the flat array.

    Args:
      index_AX: [rows, n] int32, in [0, row_size).
      row_size: entries per row.

    Returns:
      [rows, n] int32.

    Examples:
      >>> in_rows(jnp.array([[2], [0]]), 3).tolist()
      [[2], [3]]
    """
    row_A = jnp.arange(index_AX.shape[0], dtype=jnp.int32)
    return index_AX + (row_A * row_size)[:, None]


def divisor_from(number: int, least: int) -> int:
    """Returns the smallest divisor of `number` from `least` on, or `number` itself."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = small + [number // d for d in reversed(small)]
    return next((d for d in divisors if d >= least), number)
