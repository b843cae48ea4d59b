"""The weights of a device's slots, from the weights of the experts.

Training keeps one copy of each expert, divided among the devices of the expert axis.
Where an expert is computed, and how often, is the placement's business: before the
layer runs, each slot fetches its expert's weights. The transpose of that adds the
gradients of all replicas up where the expert lives, and a checkpoint never hears of
slots.

Shape suffixes: E experts, S slots, D devices, I slots of this device, N rows sent.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.layer.exchange import Segments, Transport, exchange
from eplb_jax.layer.varying import vary_alike
from eplb_jax.placement import ExpertTables, divisor_from, take_or_zero

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

    A device may have to send an expert to every slot that is not another expert's only
    one. For that unlikely case there must be a buffer, so where it would be larger than
    the result, the features travel in slices, one after the other.

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
        return jax.tree.map(lambda leaf: take_or_zero(leaf, expert_S), weights)
    per_device = tables.num_experts // num_devices
    # Each expert of the others has a slot, so these are the most that mine can have.
    num_sent = tables.num_physical_experts - tables.num_experts + per_device
    owner_S = jnp.where(expert_S >= 0, expert_S // per_device, num_devices)
    source_S = expert_S - owner_S * per_device
    fetch = plan_weight_gather(owner_S, source_S, num_devices, num_sent, axis_name)

    slices = -(-num_sent // (tables.num_physical_experts // num_devices))

    def gather(leaf: jax.Array) -> jax.Array:
        count = divisor_from(math.prod(leaf.shape[1:]), slices)
        return _fetch_slices(leaf, fetch, count, axis_name, transport)

    return jax.tree.map(gather, weights)


class WeightGatherPlan(NamedTuple):
    """Which rows of which device each slot of this device is filled with.

    Attributes:
      segments: rows from device to device.
      sent: [rows sent] int32, rows of this device in the order in which they are sent;
        out of range where nothing is.
      place: [slots of this device] int32, the received row of each slot; out of range
        for a slot that takes none.
    """

    segments: Segments
    sent: jax.Array
    place: jax.Array


def plan_weight_gather(
    owner: jax.Array,
    source: jax.Array,
    num_devices: int,
    num_sent: int,
    axis_name: str,
) -> WeightGatherPlan:
    """Plans a fetch of one row for each slot; call in `jax.shard_map`.

    Args:
      owner: [slots] int32, the device that has the row; num_devices for none.
      source: [slots] int32, which of that device's rows it is.
      num_devices: devices that the slots are divided among.
      num_sent: rows that a device sends at most.
      axis_name: mesh axis of the devices.

    Returns:
      A `WeightGatherPlan`.
    """
    none = jnp.iinfo(jnp.int32).max
    sizes_DD = count_gathered_experts(owner, num_devices)
    segments = Segments(
        sizes_DD,
        jnp.cumsum(sizes_DD, axis=1) - sizes_DD,
        jnp.cumsum(sizes_DD, axis=0) - sizes_DD,
    )
    me = lax.axis_index(axis_name)
    slot_N = jnp.argsort(owner != me, stable=True)[:num_sent]
    sent_N = jnp.where(owner[slot_N] == me, source[slot_N], none)
    # Rows arrive by owner; the slots that take none are last in that order.
    owner_I = owner.reshape(num_devices, -1)[me]
    order_I = jnp.argsort(owner_I, stable=True)
    arrived_I = jnp.arange(len(order_I), dtype=jnp.int32)
    place_I = jnp.zeros_like(arrived_I).at[order_I].set(arrived_I)
    return WeightGatherPlan(
        segments, sent_N, jnp.where(owner_I < num_devices, place_I, none)
    )


def count_gathered_experts(owner: jax.Array, num_devices: int) -> jax.Array:
    """How many rows each device sends to each.

    Args:
      owner: [slots] int32, the device that has the row of a slot; num_devices for none.
      num_devices: devices that the slots are divided among.

    Returns:
      [devices, devices] int32, from device to device.
    """
    device_D = jnp.arange(num_devices, dtype=jnp.int32)
    owner_DI = owner.reshape(num_devices, -1)
    return (owner_DI[None] == device_D[:, None, None]).sum(axis=2, dtype=jnp.int32)


def gather_weight_rows(
    rows: jax.Array, fetch: WeightGatherPlan, axis_name: str, transport: Transport
) -> jax.Array:
    """Fills the slots of this device as planned; differentiable.

    Args:
      rows: [rows, ...], this device's.
      fetch: of `plan_weight_gather`.
      axis_name: mesh axis of the devices.
      transport: see `exchange`.

    Returns:
      [slots of this device, ...]; zeros in a slot that takes no row.
    """
    num_slots = len(fetch.place)
    sent = take_or_zero(rows, fetch.sent)
    received = exchange(sent, fetch.segments, num_slots, axis_name, transport)
    return take_or_zero(received, fetch.place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _fetch_slices(
    rows: jax.Array,
    fetch: WeightGatherPlan,
    count: int,
    axis_name: str,
    transport: Transport,
) -> jax.Array:
    """`gather_weight_rows` with a `count`-th of the features at a time."""

    def bring(part: jax.Array) -> jax.Array:
        return gather_weight_rows(part, fetch, axis_name, transport)

    return _by_slices(bring, rows, len(fetch.place), count)


def _fetch_forward(
    rows: jax.Array,
    fetch: WeightGatherPlan,
    count: int,
    axis_name: str,
    transport: Transport,
) -> Any:
    fetched = _fetch_slices(rows, fetch, count, axis_name, transport)
    return fetched, (fetch, rows.shape[0])


def _fetch_backward(
    count: int, axis_name: str, transport: Transport, saved: Any, ct: jax.Array
) -> Any:
    fetch, num_rows = saved

    def add_up(part: jax.Array) -> jax.Array:
        # Linear, so any point will do.
        zeros = jnp.zeros((num_rows, *part.shape[1:]), part.dtype)
        _, pullback = jax.vjp(
            lambda rows: gather_weight_rows(rows, fetch, axis_name, transport),
            *vary_alike(zeros, part)[:1],
        )
        return pullback(part)[0]

    return _by_slices(add_up, ct, num_rows, count), None


_fetch_slices.defvjp(_fetch_forward, _fetch_backward)


def _by_slices(function, rows: jax.Array, num_results: int, count: int) -> jax.Array:
    """`function` of [rows, F] to [results, F], on a `count`-th of the features at once.

    The result starts as some of the rows and not as zeros, although all of it is
    written: XLA makes zeros when a step starts, and holds them until here.
    """
    if count == 1:
        return function(rows)
    flat = rows.reshape(len(rows), -1)
    size = flat.shape[1] // count

    def step(i: jax.Array, results: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(flat, i * size, size, axis=1)
        new = function(part)
        return lax.dynamic_update_slice_in_dim(results, new, i * size, axis=1)

    some = flat[jnp.arange(num_results) % len(rows)]
    results = lax.fori_loop(0, count, step, some)
    return results.reshape(num_results, *rows.shape[1:])


def _check(weights: PyTree, tables: ExpertTables, num_devices: int) -> None:
    if tables.expert_count.ndim != 1:
        raise ValueError("tables are of several layers; pass one's, tables.layer(i).")
    for name in ("num_physical_experts", "num_experts"):
        if num_devices < 1 or getattr(tables, name) % num_devices:
            raise ValueError(
                f"{num_devices=} must divide {name}={getattr(tables, name)}."
            )
    check_held(weights, tables.num_experts, num_devices, "experts")


def check_held(weights: PyTree, total: int, num_devices: int, what: str) -> None:
    """Raises unless each leaf's first axis is this device's part of `total`.

    Args:
      weights: pytree of arrays.
      total: experts or slots of all devices.
      num_devices: devices that they are divided among.
      what: their name, for the message.

    Raises:
      ValueError: naming the leaf.
    """
    held = total // num_devices
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != held:
            raise ValueError(
                f"weights{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but "
                f"a device holds {held} of {total} {what}; their axis comes first."
            )
