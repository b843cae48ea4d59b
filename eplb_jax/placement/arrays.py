"""Gathers and scatters that promise what they know, and divisions that are exact.

Shape suffixes: R rows, N and M entries of a row.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def take(value: jax.Array, index: jax.Array) -> jax.Array:
    """`value[index]` of a flat array, for indices known to be inside.

    Args:
      value: [n].
      index: [...] int32, in [0, n).

    Returns:
      [...], like `value`.

    Examples:
      >>> import jax.numpy as jnp
      >>> take(jnp.array([7, 8, 9]), jnp.array([[2, 0]])).tolist()
      [[9, 7]]
    """
    return value.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def take_or_zero(rows: jax.Array, index: jax.Array) -> jax.Array:
    """`rows[index]`, and zeros where there is no such row.

    Args:
      rows: [n, ...].
      index: [m] int32; what is negative or not below n is no row.

    Returns:
      [m, ...], like `rows`.

    Examples:
      >>> take_or_zero(jnp.array([7, 8, 9]), jnp.array([2, -1, 3])).tolist()
      [9, 0, 0]
    """
    return rows.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.jit
def put(value: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """`value[index] = new` in a flat array, for distinct indices known to be inside.

    Args:
      value: [n].
      index: [...] int32, in [0, n), each once.
      new: [...], like `value`.

    Returns:
      [n].

    Examples:
      >>> import jax.numpy as jnp
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
def take_rows(value_RN: jax.Array, index_RM: jax.Array) -> jax.Array:
    """`result[r, m] = value[r, index[r, m]]`, for indices known to be inside.

    Args:
      value_RN: [rows, n].
      index_RM: [rows, m] int32.

    Returns:
      [rows, m], like `value_RN`.

    Examples:
      >>> import jax.numpy as jnp
      >>> take_rows(jnp.array([[7, 8], [5, 6]]), jnp.array([[1, 1], [0, 1]])).tolist()
      [[8, 8], [5, 6]]
    """
    return take(value_RN.reshape(-1), in_rows(index_RM, value_RN.shape[1]))


@jax.jit
def invert(order_RN: jax.Array, value_RN: jax.Array) -> jax.Array:
    """`result[r, order[r, n]] = value[r, n]`, for rows that are permutations.

    Args:
      order_RN: [rows, n] int32, each row a permutation.
      value_RN: [rows, n].

    Returns:
      [rows, n], like `value_RN`.

    Examples:
      >>> import jax.numpy as jnp
      >>> invert(jnp.array([[2, 0, 1]]), jnp.array([[7, 8, 9]])).tolist()
      [[8, 9, 7]]
    """
    index_RN = in_rows(order_RN, order_RN.shape[1])
    flat = jnp.zeros(value_RN.size, value_RN.dtype)
    return put(flat, index_RN, value_RN).reshape(value_RN.shape)


@jax.jit
def divide(load: jax.Array, count: jax.Array) -> jax.Array:
    """`load / count` in float32, rounded as IEEE 754 says, on every backend.

    XLA:GPU's own float32 division may be off by two units in the last place, which
    can turn a comparison round. A float64 quotient of float32 values, rounded to
    float32, is the correctly rounded one (53 >= 2 * 24 + 2 bits).

    Args:
      load: [...] float32.
      count: [...] integers, not zero.

    Returns:
      [...] float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> divide(jnp.array([1.0, 2.0]), jnp.array([3, 4])).tolist()
      [0.3333333432674408, 0.5]
    """
    with jax.enable_x64(True):
        quotient = load.astype(jnp.float64) / count.astype(jnp.float64)
        return quotient.astype(jnp.float32)


def in_rows(index_RN: jax.Array, row_size: int) -> jax.Array:
    """Indices into a flat array, from indices into its rows.

    Args:
      index_RN: [rows, n] int32, in [0, row_size).
      row_size: entries of a row.

    Returns:
      [rows, n] int32.

    Examples:
      >>> in_rows(jnp.array([[2], [0]]), 3).tolist()
      [[2], [3]]
    """
    row_R = jnp.arange(index_RN.shape[0], dtype=jnp.int32)
    return index_RN + (row_R * row_size)[:, None]


def divisor_from(number: int, least: int) -> int:
    """The smallest divisor of `number` that is `least` or more, or `number` itself."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = small + [number // d for d in reversed(small)]
    return next((d for d in divisors if d >= least), number)
