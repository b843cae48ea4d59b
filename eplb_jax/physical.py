"""The weights of a device's slots, from the weights of the experts.

Training keeps one copy of each expert, divided among the devices of the expert axis.
Where an expert is computed, and how often, is the placement's business: before the
layer runs, each slot fetches its expert's weights. The transpose of that adds the
gradients of all replicas up where the expert lives, and a checkpoint never hears of
slots.

Shape suffixes: E experts, S slots, D devices, I slots of this device, N rows sent.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.exchange import Segments, Transport, exchange
from eplb_jax.tables import ExpertTables

PyTree = Any


def physical_weights(
    weights: PyTree,
    tables: ExpertTables,
    *,
    num_devices: int = 1,
    axis_name: str | None = None,
    transport: Transport = "auto",
) -> PyTree:
    """Gathers the weights of this device's slots; differentiable.

    Args:
      weights: pytree whose leaves are [experts of this device, ...]: all experts on
        one device, else the experts divided among the devices in order.
      tables: of one layer.
      num_devices: devices that the slots, and the experts, are divided among.
      axis_name: mesh axis of the devices, inside `jax.shard_map`; None on one device.
      transport: see `exchange`.

    Returns:
      Pytree of [slots of this device, ...]; zeros in an empty slot.

    Raises:
      ValueError: for devices that divide the slots or the experts unevenly, and for
        leaves without this device's experts.

    Examples:
      >>> tables = ExpertTables.from_placement(jnp.array([1, 0, 1]), 2)
      >>> physical_weights(jnp.array([10.0, 20.0]), tables).tolist()
      [20.0, 10.0, 20.0]
      >>> total = lambda w: (physical_weights(w, tables) * jnp.array([1.0, 2, 4])).sum()
      >>> jax.grad(total)(jnp.array([10.0, 20.0])).tolist()
      [2.0, 5.0]
    """
    _check(weights, tables, num_devices)
    expert_S = tables.physical_to_logical_map
    if axis_name is None or num_devices == 1:
        return jax.tree.map(lambda leaf: _take(leaf, expert_S), weights)
    per_device = tables.num_experts // num_devices
    # Each expert of the others has a slot, so these are the most that mine can have.
    num_sent = tables.num_slots - tables.num_experts + per_device
    device_D = jnp.arange(num_devices, dtype=jnp.int32)
    owner_S = jnp.where(expert_S >= 0, expert_S // per_device, num_devices)
    owner_DI = owner_S.reshape(num_devices, -1)
    sizes_DD = (owner_DI[None] == device_D[:, None, None]).sum(axis=2, dtype=jnp.int32)
    segments = Segments(
        sizes_DD,
        jnp.cumsum(sizes_DD, axis=1) - sizes_DD,
        jnp.cumsum(sizes_DD, axis=0) - sizes_DD,
    )
    me = lax.axis_index(axis_name)
    slot_N = jnp.argsort(owner_S != me, stable=True)[:num_sent]
    row_N = expert_S[slot_N] - me * per_device
    # Rows that no segment reads: out of range, so that they take no gradient.
    row_N = jnp.where(owner_S[slot_N] == me, row_N, jnp.iinfo(jnp.int32).max)
    # Rows arrive by owner; empty slots come last, and take none.
    order_I = jnp.argsort(owner_DI[me], stable=True)
    place_I = jnp.zeros_like(order_I).at[order_I].set(jnp.arange(len(order_I)))

    def gather(leaf: jax.Array) -> jax.Array:
        sent = _take(leaf, row_N)
        received = exchange(sent, segments, len(place_I), axis_name, transport)
        return _take(received, place_I)

    return jax.tree.map(gather, weights)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    index = jnp.where(index < 0, jnp.iinfo(index.dtype).max, index)
    return rows.at[index].get(mode="fill", fill_value=0)


def _check(weights: PyTree, tables: ExpertTables, num_devices: int) -> None:
    if tables.expert_count.ndim != 1:
        raise ValueError("tables are of several layers; pass one's, tables.layer(i).")
    for name in ("num_slots", "num_experts"):
        if num_devices < 1 or getattr(tables, name) % num_devices:
            raise ValueError(
                f"{num_devices=} must divide {name}={getattr(tables, name)}."
            )
    per_device = tables.num_experts // num_devices
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != per_device:
            raise ValueError(
                f"weights{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but "
                f"a device holds {per_device} of {tables.num_experts} experts; their "
                "axis comes first."
            )
