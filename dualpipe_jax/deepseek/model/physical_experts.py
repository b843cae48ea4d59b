"""Gathers the weights of physical experts from the logical ones; and its transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from eplb_jax import ExpertTables, physical_weights

P = PartitionSpec
PyTree = Any


def gather_physical_experts(
    experts: PyTree,
    tables: ExpertTables,
    mesh: Mesh | AbstractMesh,
    leading: str | None,
) -> PyTree:
    """Gathers the weights of all physical experts, once for all microbatches of a step.

    Args:
      experts: pytree, leaves [stages, experts, ...], experts divided over `ep`.
      tables: [stages, ...], those of each stage's layer at this position.
      mesh: with the axis `ep`.
      leading: mesh axis of the stages, or None.

    Returns:
      The same with physical experts in place of experts.
    """

    def gather(experts: PyTree, tables: ExpertTables) -> PyTree:
        return _map_stages(_gather_stage(mesh), experts, tables)

    return _mapped(gather, mesh, leading)(experts, tables)


def sum_replica_grads(
    grads: PyTree,
    tables: ExpertTables,
    mesh: Mesh | AbstractMesh,
    leading: str | None,
) -> PyTree:
    """Adds up the gradients of each expert's replicas.

    This is the transpose of `gather_physical_experts`, with the same arguments.
    """
    per_device = tables.num_experts // mesh.shape["ep"]
    gather = _gather_stage(mesh)

    def add_stage(grads: PyTree, tables: ExpertTables) -> PyTree:
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros((per_device, *leaf.shape[1:]), leaf.dtype), grads
        )
        # Linear, so any point will do; XLA removes the gathering of zeros.
        _, pullback = jax.vjp(lambda experts: gather(experts, tables), zeros)
        return pullback(grads)[0]

    def add(grads: PyTree, tables: ExpertTables) -> PyTree:
        return _map_stages(add_stage, grads, tables)

    return _mapped(add, mesh, leading)(grads, tables)


def _gather_stage(mesh: Mesh | AbstractMesh) -> Callable[[PyTree, ExpertTables], Any]:
    num_devices = mesh.shape["ep"]

    def gather(experts: PyTree, tables: ExpertTables) -> PyTree:
        return physical_weights(
            experts,
            tables,
            num_devices=num_devices,
            axis_name="ep" if num_devices > 1 else None,
        )

    return gather


def _map_stages(function, trees: PyTree, tables: ExpertTables) -> PyTree:
    """Maps over a device's few stages in turn; collectives have no batching rule."""
    results = [
        function(jax.tree.map(lambda leaf, i=i: leaf[i], trees), tables.layer(i))
        for i in range(len(tables.expert_count))
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _mapped(function, mesh: Mesh | AbstractMesh, leading: str | None):
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(leading, "ep"), P(leading)),
        out_specs=P(leading, "ep"),
        # Which values differ between devices is clear here without the check.
        check_vma=False,
    )
