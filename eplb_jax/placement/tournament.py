"""Takes the smallest of many keys, again and again, in all rows at once.

A key is an int64 that holds a value, the index that breaks ties, and a count, so that
one `min` finds all three. The keys form a tournament of two levels: a step reads the
blocks' minima and one block instead of all keys.

Shape suffixes: see `eplb_jax`; here also Z blocks, Q keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.arrays import put, take

# A key: 31 bits of value, 16 bits of index, 16 bits of count. Non-negative floats
# order like their bit patterns, so int64 order is (value, index) order.
INDEX_BITS = 16
VALUE_SHIFT = 2 * INDEX_BITS
FIELD_MASK = (1 << INDEX_BITS) - 1
LOW_MASK = (1 << VALUE_SHIFT) - 1
LARGEST_VALUE = (1 << 31) - 1
MAX_ITEMS = 1 << (INDEX_BITS - 1)


def take_smallest(
    keys_XA: jax.Array,
    num_steps: int,
    change: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Takes the smallest key of each row and changes it, `num_steps` times.

    Args:
      keys_XA: [keys, rows] int64.
      num_steps: number of keys to take.
      change: (key [rows], step []) -> the key that replaces it [rows], with the same
        index field.

    Returns:
      [num_steps, rows] int32, index and count of the keys taken.
    """
    num_keys, num_rows = keys_XA.shape
    # A step reads the blocks' minima and one block: each near the square root.
    block = num_keys if num_keys <= 16 else 1 << round(math.log2(num_keys) / 2)
    padding = ((0, -num_keys % block), (0, 0))
    largest = jnp.iinfo(jnp.int64).max
    padded_XA = jnp.pad(keys_XA, padding, constant_values=largest)
    keys_ZQA = padded_XA.reshape(-1, block, num_rows)
    block_Z1 = jnp.arange(keys_ZQA.shape[0], dtype=jnp.int32)[:, None]
    # One number addresses a key: XLA would build index vectors in an extra pass.
    row_A = jnp.arange(num_rows, dtype=jnp.int32)
    inside_QA = jnp.arange(block * num_rows, dtype=jnp.int32).reshape(block, num_rows)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        keys, smallest_ZA, taken_XA = carry
        key_A = smallest_ZA.min(axis=0)
        index_A, _ = fields(key_A)
        block_1A = (index_A // block)[None]
        # Write first, then read the block: in the other order XLA keeps the old
        # keys alive and copies all of them in every step.
        keys = put(keys, index_A * num_rows + row_A, change(key_A, i))
        block_QA = take(keys, block_1A * (block * num_rows) + inside_QA)
        smallest_1A = block_QA.min(axis=0, keepdims=True)
        smallest_ZA = jnp.where(block_Z1 == block_1A, smallest_1A, smallest_ZA)
        taken_XA = lax.dynamic_update_index_in_dim(
            taken_XA, key_A.astype(jnp.int32), i, 0
        )
        return keys, smallest_ZA, taken_XA

    taken_XA = jnp.zeros((num_steps, num_rows), jnp.int32)
    carry = (keys_ZQA.reshape(-1), keys_ZQA.min(axis=1), taken_XA)
    return lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, carry)[2]


def fields(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns index and count of a key, int32."""
    low = key.astype(jnp.int32)
    return (low >> INDEX_BITS) & FIELD_MASK, low & FIELD_MASK


def bits(value: jax.Array) -> jax.Array:
    """Returns the bit patterns of non-negative float32 values, as int64: same order."""
    value = jnp.where(value == 0, jnp.float32(0), value)  # -0.0 is no smaller
    return lax.bitcast_convert_type(value, jnp.int32).astype(jnp.int64)


def from_bits(pattern: jax.Array) -> jax.Array:
    """Returns the float32 values of bit patterns, the inverse of `bits`."""
    return lax.bitcast_convert_type(pattern.astype(jnp.int32), jnp.float32)


def descending(value: jax.Array) -> jax.Array:
    """Makes keys whose ascending order is the descending order of the values."""
    return (LARGEST_VALUE - bits(value)) << VALUE_SHIFT


def check_size(name: str, size: int) -> None:
    """Raises ValueError if `size` does not fit the fields of a key."""
    if size > MAX_ITEMS:
        raise ValueError(
            f"{name} is {size}, but a sort key holds at most {MAX_ITEMS}; use fewer."
        )
