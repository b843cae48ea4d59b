"""Compares and describes pytrees of arrays, or of their shapes, for error messages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def describe(tree: PyTree) -> str:
    """Describes the dtypes and shapes of a pytree's arrays.

    Examples:
      >>> describe(jnp.ones((2, 3)))
      'float32[2, 3]'
      >>> describe({"a": jnp.ones(2), "b": 1})
      "['a'] float32[2], ['b'] int32[]"
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        return "no arrays"
    return ", ".join(
        f"{jax.tree_util.keystr(path)} {_describe_leaf(leaf)}".lstrip()
        for path, leaf in leaves
    )


def difference(tree: PyTree, other: PyTree) -> str | None:
    """Describes the first difference of two pytrees; None if there is none.

    They are equal if they have the same structure, and their leaves the same shapes and
    dtypes.

    Examples:
      >>> difference({"a": 1.0}, {"a": 1})
      "['a'] is float32[] against int32[]"
      >>> difference((1, 2), [1, 2])
      'the structure is PyTreeDef((*, *)) against PyTreeDef([*, *])'
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    other_leaves, other_structure = jax.tree.flatten(other)
    if structure != other_structure:
        return f"the structure is {structure} against {other_structure}"
    for (path, leaf), other_leaf in zip(leaves, other_leaves, strict=True):
        if _kind(leaf) != _kind(other_leaf):
            where = jax.tree_util.keystr(path) or "it"
            here, there = _describe_leaf(leaf), _describe_leaf(other_leaf)
            return f"{where} is {here} against {there}"
    return None


def _describe_leaf(leaf: Any) -> str:
    shape, dtype = _kind(leaf)
    return f"{dtype}{list(shape)}"


def _kind(leaf: Any) -> tuple[tuple[int, ...], Any]:
    return jnp.shape(leaf), jnp.result_type(leaf)
