"""An order between collectives that XLA for CPUs keeps.

Its runtime executes a program's collectives in their order, unless it has read the
program from the compilation cache: then those of each loop and branch have an order of
their own (jaxlib 0.10.2), devices may wait for each other in different ones, and
collectives of one kind and group may take each other's values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


def zero_after(tree: PyTree) -> jax.Array:
    """Returns a zero, int32, that XLA computes from one element of each array.

    What is indexed with it waits for all of them. `lax.optimization_barrier` says the
    same, but XLA for CPUs drops it before it decides what may run at one time.
    """
    zero = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(tree):
        if leaf.size:
            element = leaf[(0,) * leaf.ndim]
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                element = lax.bitcast_convert_type(
                    jnp.real(element).astype(jnp.float32), jnp.int32
                )
            # Never holds, which XLA does not know.
            zero += ((element.astype(jnp.int32) | 1) == 0).astype(jnp.int32)
    return zero


def wait_for(tree: PyTree, others: PyTree) -> PyTree:
    """Returns arrays as they are; on CPUs they are there only after the others."""

    def wait(tree: PyTree, others: PyTree) -> PyTree:
        is_there = zero_after(others) == 0  # always

        def one(leaf: jax.Array) -> jax.Array:
            return jnp.where(is_there, leaf, jnp.zeros((), leaf.dtype))

        return jax.tree.map(one, tree)

    return on_cpu(wait, lambda tree, _: tree, tree, others)


def on_cpu(function: Callable, other: Callable, *args: Any) -> Any:
    """Calls one function where the program is lowered for CPUs, the other elsewhere."""
    return lax.platform_dependent(*args, cpu=function, default=other)
