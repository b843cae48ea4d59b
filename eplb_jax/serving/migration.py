"""Migration of a running server's weights from one placement to the next.

Only physical experts whose expert changes receive weights, from this device if it has
the expert, else from one that has. All of them change at once, a slice of the features
at a time: each slice is read everywhere before it is written anywhere. So moves need no
order in which no expert is lost, and the buffers hold a slice, not a second copy.

Shape suffixes: see `eplb_jax`; here V values of an expert, flat.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eplb_jax.layer import (
    Transport,
    check_held,
    count_gathered_experts,
    gather_weight_rows,
    plan_weight_gather,
)
from eplb_jax.placement import ExpertTables, divisor_from
from eplb_jax.runtime import on_cpu

PyTree = Any


# Traced once for all layers of a server.
@functools.partial(
    jax.jit, static_argnames=("num_devices", "axis_name", "num_slices", "transport")
)
def migrate(
    weights: PyTree,
    old_tables: ExpertTables,
    new_tables: ExpertTables,
    *,
    num_devices: int = 1,
    axis_name: str | None = None,
    num_slices: int | None = None,
    transport: Transport = "auto",
) -> PyTree:
    """Moves physical weights from one placement to another; for use inside jit.

    The result equals, bit for bit, what `physical_weights` would gather for the new
    tables. Donate `weights` to the jitted function around this (`donate_argnums`), and
    they change in place. Use the old tables until the call, and the new ones after it.

    Args:
      weights: pytree of [physical experts of this device, ...], by `old_tables`.
      old_tables: the tables of one layer.
      new_tables: of the same layer and shapes.
      num_devices: devices that the physical experts are divided among, in order.
      axis_name: mesh axis of the devices, inside `jax.shard_map`; None on one device.
      num_slices: minimal number of slices of the features; None: four per device. The
        buffers of a device hold up to physical experts / num_slices experts, for the
        worst case of one device sending to all physical experts.
      transport: see `exchange`.

    Returns:
      Pytree like `weights`, by `new_tables`; zeros for an empty physical expert.

    Raises:
      ValueError: for tables of different shapes, weights of other physical experts,
        and fewer than one slice.

    Examples:
      >>> old = ExpertTables.from_placement(jnp.array([0, 1, 0]), 2)
      >>> new = ExpertTables.from_placement(jnp.array([1, 1, 0]), 2)
      >>> migrate(jnp.array([[5.0], [7.0], [5.0]]), old, new).tolist()
      [[7.0], [7.0], [5.0]]
    """
    if num_slices is None:
        num_slices = 4 * num_devices
    _check(weights, old_tables, new_tables, num_devices, num_slices)
    owner_S, source_S = _sources(old_tables, new_tables, num_devices)
    expert_S = new_tables.physical_to_logical_map
    me = jnp.int32(0) if axis_name is None else lax.axis_index(axis_name)
    is_changed_I = (owner_S < num_devices).reshape(num_devices, -1)[me]
    is_filled_I = (expert_S >= 0).reshape(num_devices, -1)[me]
    if axis_name is None:

        def gather(rows_IV: jax.Array) -> jax.Array:
            return rows_IV[source_S]

    else:
        num_sent = old_tables.num_physical_experts
        plan = plan_weight_gather(owner_S, source_S, num_devices, num_sent, axis_name)

        def gather(rows_IV: jax.Array) -> jax.Array:
            return gather_weight_rows(rows_IV, plan, axis_name, transport)

    def moved(old_IV: jax.Array) -> jax.Array:
        new_IV = jnp.where(is_changed_I[:, None], gather(old_IV), old_IV)
        zero = jnp.zeros((), old_IV.dtype)
        return jnp.where(is_filled_I[:, None], new_IV, zero)

    def in_slices(flat_IV: jax.Array) -> jax.Array:
        num_features = flat_IV.shape[1]
        size = num_features // divisor_from(num_features, num_slices)

        def step(i: jax.Array, flat_IV: jax.Array) -> jax.Array:
            old_IV = lax.dynamic_slice_in_dim(flat_IV, i * size, size, axis=1)
            return lax.dynamic_update_slice_in_dim(
                flat_IV, moved(old_IV), i * size, axis=1
            )

        return lax.fori_loop(0, num_features // size, step, flat_IV)

    def change(leaf: jax.Array) -> jax.Array:
        flat_IV = leaf.reshape(len(leaf), -1)
        # No loop on CPUs: see `runtime`.
        return on_cpu(moved, in_slices, flat_IV).reshape(leaf.shape)

    return jax.tree.map(change, weights)


def count_migrated(
    old_tables: ExpertTables, new_tables: ExpertTables, num_devices: int
) -> jax.Array:
    """Counts the experts whose weights `migrate` sends from each device to each other.

    Args:
      old_tables: the tables of one layer.
      new_tables: of the same layer.
      num_devices: devices that the physical experts are divided among, in order.

    Returns:
      [devices, devices] int32; the diagonal counts moves inside a device. Multiply by
      the bytes of an expert to get the bytes that `migrate` moves.

    Examples:
      >>> old = ExpertTables.from_placement(jnp.array([0, 1, 0, 2]), 3)
      >>> new = ExpertTables.from_placement(jnp.array([1, 1, 0, 2]), 3)
      >>> count_migrated(old, new, 2).tolist()
      [[1, 0], [0, 0]]
    """
    owner_S, _ = _sources(old_tables, new_tables, num_devices)
    return count_gathered_experts(owner_S, num_devices)


def _sources(
    old: ExpertTables, new: ExpertTables, num_devices: int
) -> tuple[jax.Array, jax.Array]:
    """Chooses the replica that each physical expert's new weights come from.

    Returns:
      owner_S: its device; num_devices for a physical expert that does not change.
      source_S: its position on that device.
    """
    per_device = old.num_physical_experts // num_devices
    expert_S = new.physical_to_logical_map
    physical_S = jnp.arange(len(expert_S), dtype=jnp.int32)
    replicas_SR = old.logical_to_physical_map[expert_S]
    # A replica on the same device if there is one; else the replicas take turns.
    is_here_SR = replicas_SR // per_device == (physical_S // per_device)[:, None]
    count_S1 = old.expert_count[expert_S][:, None]
    turn_SR = (jnp.arange(old.max_replicas)[None] + physical_S[:, None]) % count_S1
    order_SR = jnp.where(is_here_SR, -1, turn_SR)
    order_SR = jnp.where(replicas_SR >= 0, order_SR, jnp.iinfo(jnp.int32).max)
    best_S1 = jnp.argmin(order_SR, axis=1, keepdims=True)
    from_S = jnp.take_along_axis(replicas_SR, best_S1, axis=1)[:, 0]
    is_changed_S = (expert_S != old.physical_to_logical_map) & (expert_S >= 0)
    owner_S = jnp.where(is_changed_S, from_S // per_device, num_devices)
    return owner_S, from_S % per_device


def _check(
    weights: PyTree,
    old: ExpertTables,
    new: ExpertTables,
    num_devices: int,
    num_slices: int,
) -> None:
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(t)] for t in (old, new)]
    if old.expert_count.ndim != 1 or shapes[0] != shapes[1]:
        raise ValueError(
            f"old_tables and new_tables have shapes {shapes[0]} and {shapes[1]}; both "
            "must be of one layer, and made with the same numbers of experts and "
            "max_replicas."
        )
    if num_devices < 1 or old.num_physical_experts % num_devices:
        raise ValueError(
            f"{num_devices=} must divide the {old.num_physical_experts} physical "
            "experts."
        )
    if num_slices < 1:
        raise ValueError(f"{num_slices=} must be at least 1; 1 moves all at once.")
    check_held(weights, old.num_physical_experts, num_devices, "physical experts")
