"""Varying-axes types of values, for `jax.shard_map` with `check_vma=True`."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

PyTree = Any


def vary_alike(*values: PyTree) -> Any:
    """Marks values as varying over each mesh axis over which any of them varies.

    A loop's carry needs one type from start to end, even if it starts as zeros. And the
    transpose of the mark is the sum over the axis, which the gradient of a replicated
    value needs and a `custom_vjp` does not get otherwise.

    Args:
      *values: pytrees of arrays.

    Returns:
      A tuple of the same values, marked; unchanged outside `jax.shard_map` and with
      check_vma=False.

    Examples:
      >>> import jax.numpy as jnp
      >>> vary_alike(jnp.float32(1), jnp.float32(2))[0].item()
      1.0
    """
    leaves, structure = jax.tree.flatten(values)
    axes = frozenset().union(*(_axes(leaf) for leaf in leaves))

    def vary(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return structure.unflatten(map(vary, leaves))


def _axes(value: Any) -> frozenset[str]:
    type_ = jax.typeof(value)
    # jax 0.10 and later keep it in `manual_axis_type`, earlier versions in `vma`.
    kind = getattr(type_, "manual_axis_type", None)
    return frozenset(kind.varying if kind else getattr(type_, "vma", ()))


def is_typed(value: jax.Array) -> bool:
    """Returns whether an array's type says that its value differs between devices."""
    return bool(_axes(value))


def struct_like(shape: tuple[int, ...], dtype: Any, value: jax.Array) -> Any:
    """Returns a struct that varies over the mesh axes over which `value` varies."""
    axes = _axes(value)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    type_ = jax.typeof(value)
    if (kind := getattr(type_, "manual_axis_type", None)) is not None:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
    options: dict[str, Any] = {"vma": axes}  # of jax before 0.10
    return jax.ShapeDtypeStruct(shape, dtype, **options)
