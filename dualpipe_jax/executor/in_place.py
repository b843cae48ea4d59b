"""Reads and writes buffers in place, in forms for which XLA inserts no copies.

Leaves of a buffer have a leading slot axis. docs/design.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

PyTree = Any


def row_major(tree: PyTree) -> PyTree:
    """Constrains arrays to the row-major layout that all loops share.

    Otherwise XLA chooses a layout for each loop that a value passes through, to suit
    the products in it. It then copies whole buffers from one layout to another, and
    holds a transposed copy of the parameters for each during the whole step.
    """

    def lay(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return with_layout_constraint(leaf, Layout(tuple(range(leaf.ndim))))

    return jax.tree.map(lay, tree)


def when(predicate: jax.Array, body: Callable[[PyTree], PyTree], carry: PyTree):
    """Runs `body(carry)` where the predicate holds, as a loop of zero or one trip.

    A `lax.cond` would copy every buffer.

    The carry must hold all buffers that `body` reads or writes. The barrier orders what
    follows after those reads: XLA loses the order of a buffer that passes through a
    loop unchanged, and would copy it before the next write.
    """
    _, carry = lax.while_loop(
        lambda c: c[0],
        lambda c: (jnp.zeros_like(c[0]), body(c[1])),
        (predicate, carry),
    )
    return lax.optimization_barrier(carry)


def read(tree: PyTree, slot: jax.Array) -> PyTree:
    """Returns entry `slot` of the leading axis of every leaf."""
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, slot, keepdims=False), tree
    )


def write(tree: PyTree, slot: jax.Array, value: PyTree) -> PyTree:
    """Returns the buffers with one slot replaced."""
    return jax.tree.map(
        lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, slot, axis=0),
        tree,
        value,
    )


def at(buffers: tuple[jax.Array, ...], places: tuple[int, ...]) -> tuple:
    """Returns the arrays at some positions of a tuple."""
    return tuple(buffers[place] for place in places)


def write_at(
    buffers: tuple[jax.Array, ...],
    places: tuple[int, ...],
    slot: jax.Array,
    values: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Writes the values to a slot of the buffers at these positions."""
    result = list(buffers)
    for place, value in zip(places, values, strict=True):
        result[place] = write(result[place], slot, value)
    return tuple(result)


def accumulate(total: PyTree, new: PyTree) -> PyTree:
    """Adds the gradients of one microbatch to their sum."""

    def add(t, n):
        # Integer parameters have no gradient, which AD marks with float0.
        return t if n.dtype == jax.dtypes.float0 else t + n.astype(t.dtype)

    return jax.tree.map(add, total, new)
