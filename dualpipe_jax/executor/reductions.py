"""Sums and means over microbatches, ranks and data axes, in dtypes that hold them.

An auxiliary output may be a bool, a count in int8 or a norm in bfloat16. Its sum over a
step's microbatches rarely fits that dtype, so what is summed is at least int32 or
float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax.executor.in_place import write

PyTree = Any


def sum_dtype(dtype: Any, floating: Any = jnp.float32) -> Any:
    """Returns the dtype in which values of a dtype are summed.

    Args:
      dtype: of the values.
      floating: the least dtype for sums of floating values.

    Returns:
      At least int32 (uint32 if unsigned) or `floating`.

    Examples:
      >>> [str(sum_dtype(jnp.dtype(name))) for name in ("bool", "uint8", "int32")]
      ['int32', 'uint32', 'int32']
      >>> [str(sum_dtype(jnp.dtype(name))) for name in ("bfloat16", "float32")]
      ['float32', 'float32']
    """
    dtype, floating = jnp.dtype(dtype), jnp.dtype(floating)
    if jnp.issubdtype(dtype, jnp.inexact):
        if jnp.finfo(dtype).bits < 16:  # no promotion is defined
            return floating
        with jax.numpy_dtype_promotion("standard"):
            return jnp.promote_types(dtype, floating)
    if dtype != jnp.bool_ and jnp.iinfo(dtype).bits >= 32:
        return dtype
    is_unsigned = jnp.issubdtype(dtype, jnp.unsignedinteger)
    return jnp.dtype(jnp.uint32 if is_unsigned else jnp.int32)


def sum_over_ranks(tree: PyTree, axis_name: str) -> PyTree:
    """Sums arrays over the pipeline's ranks, in their own dtypes."""
    # `psum` makes int32 of bools, and few backends add 8-bit floats.
    wide = jax.tree.map(
        lambda leaf: leaf if leaf.dtype.itemsize > 1 else _widened(leaf), tree
    )
    total = lax.psum(wide, axis_name)
    return jax.tree.map(lambda t, leaf: t.astype(leaf.dtype), total, tree)


@dataclasses.dataclass(frozen=True)
class AuxReduction:
    """How the auxiliary outputs of microbatches become those of a step.

    Attributes:
      kind: "sum", "mean" or "stack" over microbatches; over data axes "sum" sums, and
        the others take the mean.
      num_microbatches: number of microbatches in a step.
      data_axes: mesh axes over which the outputs are reduced too.
    """

    kind: str
    num_microbatches: int
    data_axes: tuple[str, ...]

    def zeros(self, aux: PyTree) -> PyTree:
        """Returns the accumulators of outputs with these shapes and dtypes."""

        def zeros(leaf: Any) -> jax.Array:
            if self.kind == "stack":
                return jnp.zeros((self.num_microbatches, *leaf.shape), leaf.dtype)
            return jnp.zeros(leaf.shape, sum_dtype(leaf.dtype))

        return jax.tree.map(zeros, aux)

    def add(self, total: PyTree, new: PyTree, microbatch: jax.Array) -> PyTree:
        """Adds the outputs of one microbatch to the accumulators."""
        new = jax.tree.map(lambda t, n: jnp.asarray(n, t.dtype), total, new)
        if self.kind == "stack":
            return write(total, microbatch, new)
        return jax.tree.map(jnp.add, total, new)

    def finish(self, total: PyTree) -> PyTree:
        """Reduces the accumulators of all microbatches over the data axes."""
        if self.data_axes:
            reduce = lax.psum if self.kind == "sum" else lax.pmean
            total = jax.tree.map(
                lambda leaf: reduce(_widened(leaf), self.data_axes), total
            )
        if self.kind == "mean":
            total = jax.tree.map(lambda leaf: leaf / self.num_microbatches, total)
        return total


def _widened(leaf: jax.Array) -> jax.Array:
    return leaf.astype(sum_dtype(leaf.dtype))
