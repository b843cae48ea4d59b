"""Weights of a running server from one placement to the next.

Only slots whose expert changes receive anything, from the nearest device that has the
expert. All of them change at once, but a slice of the features at a time: every slice
is read everywhere before it is written anywhere, so no order of moves has to be found
in which no expert is lost, and the buffers are a slice, not a second copy.

Shape suffixes: S slots, C replicas of an expert at most, D devices, I slots of this
device, F features of a slot.
"""

from __future__ import annotations

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

PyTree = Any


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
    """Brings physical weights from one placement to another; for use inside jit.

    The result is what `physical_weights` would gather afresh, bit for bit. Donate
    `weights` to the jitted function around this (`donate_argnums`), and they change in
    place. The old tables serve until the call is done; then switch to the new ones.

    Args:
      weights: pytree of [slots of this device, ...], by `old_tables`.
      old_tables: of one layer.
      new_tables: of the same layer and shapes.
      num_devices: devices that the slots are divided among, in order.
      axis_name: mesh axis of the devices, inside `jax.shard_map`; None on one device.
      num_slices: into how many slices the features are divided, at least; None: four a
        device. The buffers of a device hold up to slots / num_slices experts, for
        the unlikely case that one device has to send something to all slots.
      transport: see `exchange`.

    Returns:
      Pytree like `weights`, by `new_tables`; zeros in an empty slot.

    Raises:
      ValueError: for tables of other shapes, weights of other slots, and fewer than one
        slice.

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

        def bring(rows_IF: jax.Array) -> jax.Array:
            return rows_IF[source_S]

    else:
        num_sent = old_tables.num_physical_experts
        fetch = plan_weight_gather(owner_S, source_S, num_devices, num_sent, axis_name)

        def bring(rows_IF: jax.Array) -> jax.Array:
            return gather_weight_rows(rows_IF, fetch, axis_name, transport)

    def change(leaf: jax.Array) -> jax.Array:
        flat_IF = leaf.reshape(len(leaf), -1)
        num_features = flat_IF.shape[1]
        size = num_features // divisor_from(num_features, num_slices)

        def step(i: jax.Array, flat_IF: jax.Array) -> jax.Array:
            old_IF = lax.dynamic_slice_in_dim(flat_IF, i * size, size, axis=1)
            new_IF = jnp.where(is_changed_I[:, None], bring(old_IF), old_IF)
            new_IF = jnp.where(is_filled_I[:, None], new_IF, jnp.zeros((), leaf.dtype))
            return lax.dynamic_update_slice_in_dim(flat_IF, new_IF, i * size, axis=1)

        flat_IF = lax.fori_loop(0, num_features // size, step, flat_IF)
        return flat_IF.reshape(leaf.shape)

    return jax.tree.map(change, weights)


def count_migrated(
    old_tables: ExpertTables, new_tables: ExpertTables, num_devices: int
) -> jax.Array:
    """How many experts' weights `migrate` sends from each device to each other.

    Args:
      old_tables: of one layer.
      new_tables: of the same layer.
      num_devices: devices that the slots are divided among, in order.

    Returns:
      [devices, devices] int32; the diagonal is what moves inside a device. Times the
      bytes of an expert, what `migrate` moves.

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
    """For each slot that changes, the device to fetch from and the slot there."""
    per_device = old.num_physical_experts // num_devices
    expert_S = new.physical_to_logical_map
    slot_S = jnp.arange(len(expert_S), dtype=jnp.int32)
    slots_SC = old.logical_to_physical_map[expert_S]
    # A slot of the same device if there is one; else the replicas take turns.
    is_here_SC = slots_SC // per_device == (slot_S // per_device)[:, None]
    count_S1 = old.expert_count[expert_S][:, None]
    turn_SC = (jnp.arange(old.max_replicas)[None] + slot_S[:, None]) % count_S1
    order_SC = jnp.where(is_here_SC, -1, turn_SC)
    order_SC = jnp.where(slots_SC >= 0, order_SC, jnp.iinfo(jnp.int32).max)
    best_S1 = jnp.argmin(order_SC, axis=1, keepdims=True)
    from_S = jnp.take_along_axis(slots_SC, best_S1, axis=1)[:, 0]
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
            "must be of one layer, and made with the same slots and max_replicas."
        )
    if num_devices < 1 or old.num_physical_experts % num_devices:
        raise ValueError(
            f"{num_devices=} must divide the tables' {old.num_physical_experts} "
            "physical experts."
        )
    if num_slices < 1:
        raise ValueError(f"{num_slices=} must be at least 1; 1 moves all at once.")
    check_held(weights, old.num_physical_experts, num_devices, "slots")
