"""Parameters as nested dicts: taken from modules, masked, laid out on the mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

P = PartitionSpec
PyTree = Any


def parameters(module: nnx.Module) -> PyTree:
    """Returns a module's parameters, without the router's bias."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def bias_state(bias: jax.Array) -> PyTree:
    """Returns the router's bias as the state that `nnx.merge` expects for a `Layer`."""
    return {"moe": {"bias": bias}}


def zero_where(mask_G: np.ndarray, tree: PyTree) -> PyTree:
    """Replaces the values of the masked stages by zeros."""

    def zero(leaf: jax.Array) -> jax.Array:
        mask = jnp.asarray(mask_G).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(mask, jnp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(zero, tree) if mask_G.any() else tree


def map_with_names(function, tree: PyTree) -> PyTree:
    """Maps a function of (keys of the path to a leaf, leaf) over a tree."""

    def names(path) -> tuple[str, ...]:
        return tuple(str(getattr(entry, "key", "")) for entry in path)

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(names(path), leaf), tree
    )


def spec_of(names: tuple[str, ...]) -> PartitionSpec:
    """Returns how a parameter is divided over the axes other than the pipeline's."""
    if "experts" in names:
        return P("ep")
    if names == ("kernel",) or ("dense" in names and "down" in names):
        return P("ep")
    return P(None, "ep") if "dense" in names else P()
