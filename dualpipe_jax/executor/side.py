"""Side inputs: what all stages read of a microbatch, and no stage sends to another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dualpipe_jax.executor.checks import check_microbatches
from dualpipe_jax.executor.specs import check_spec, check_spec_fits, is_spec
from dualpipe_jax.schedules import Schedule

PyTree = Any


def side_specs(specs: PyTree, mesh: Mesh, axis_name: str) -> PyTree:
    """Returns the specs of side inputs, those of None filled in; None without any.

    Raises:
      ValueError: if one is not a spec on the mesh, or divides the microbatches.
    """
    if specs is None:
        return None

    def full(path: tuple, spec: Any) -> PartitionSpec:
        if spec is None:
            return PartitionSpec()
        where = f"side{jax.tree_util.keystr(path)}"
        check_spec(where, spec, mesh, axis_name)
        if spec and spec[0] is not None:
            raise ValueError(
                f"{where} is {spec}, which divides the axis of microbatches, of which "
                f"every rank reads all; begin with None: "
                f"PartitionSpec(None, {', '.join(map(repr, spec))})."
            )
        return spec

    return jax.tree_util.tree_map_with_path(full, specs, is_leaf=is_spec)


def check_side(side: PyTree, specs: PyTree, schedule: Schedule, mesh: Mesh) -> None:
    """Raises a `ValueError` if side inputs and what was announced do not fit."""
    if specs is None:
        if side is not None:
            raise ValueError(
                "side was passed to a step whose stage_fn takes none; make the step "
                "with side=PartitionSpec(), or with specs of all side inputs."
            )
        return
    if not jax.tree.leaves(side):
        raise ValueError(
            f"side={side!r} holds no arrays, but the step was made with side={specs}; "
            "pass side=, leaves [num_microbatches, ...]."
        )
    try:
        full = jax.tree.broadcast(specs, side, is_leaf=is_spec)
    except ValueError as error:
        raise ValueError(
            f"side={specs} of the step is not a prefix of side's tree: {error}"
        ) from error
    leaves = jax.tree_util.tree_leaves_with_path(side)
    each = jax.tree.leaves(full, is_leaf=is_spec)
    for (path, leaf), spec in zip(leaves, each, strict=True):
        shape = jnp.shape(leaf)
        where = f"side{jax.tree_util.keystr(path)}"
        check_microbatches(
            where, shape, schedule, "stages read one row of each microbatch."
        )
        check_spec_fits(where, shape, spec, "its spec in side=", mesh)
