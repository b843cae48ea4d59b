"""The weights of a device's physical experts, gathered from those of the experts.

Training keeps one copy of each logical expert, divided among the devices of the expert
axis; the placement says where, and how often, an expert is computed. Before the layer
runs, each physical expert's weights are gathered from the device that keeps them. The
transpose sums the gradients of all replicas on that device, so checkpoints do not
depend on the placement.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.layer.exchange import Segments, Transport, exchange
from eplb_jax.placement import ExpertTables, divisor_from, take_or_zero
from eplb_jax.products import vary_alike
from eplb_jax.runtime import on_cpu

PyTree = Any


def physical_weights(
    weights: PyTree,
    tables: ExpertTables,
    *,
    num_devices: int = 1,
    axis_name: str | None = None,
    transport: Transport = "auto",
) -> PyTree:
    """Gathers the weights of this device's physical experts; differentiable.

    In the worst case a device sends its experts to every physical expert that is not
    the only replica of another device's expert. The buffer must have room for that; if
    it would be larger than the result, the features are sent in slices, one after the
    other.

    Args:
      weights: pytree whose leaves are [experts of this device, ...]: all experts on
        one device, else the experts divided among the devices in order.
      tables: the tables of one layer.
      num_devices: devices that the experts, logical and physical, are divided among.
      axis_name: mesh axis of the devices, inside `jax.shard_map`; None on one device.
      transport: see `exchange`.

    Returns:
      Pytree of [physical experts of this device, ...]; zeros for an empty one.

    Raises:
      ValueError: if the devices do not divide the physical or the logical experts, and
        if a leaf does not hold this device's experts.

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
    # Each expert of another device needs a replica; all the rest may be this device's.
    num_sent = tables.num_physical_experts - tables.num_experts + per_device
    owner_S = jnp.where(expert_S >= 0, expert_S // per_device, num_devices)
    source_S = expert_S - owner_S * per_device
    plan = plan_weight_gather(owner_S, source_S, num_devices, num_sent, axis_name)

    slices = -(-num_sent // (tables.num_physical_experts // num_devices))

    def gather(leaf: jax.Array) -> jax.Array:
        count = divisor_from(max(1, math.prod(leaf.shape[1:])), slices)
        return _gather_slices(leaf, plan, count, axis_name, transport)

    return jax.tree.map(gather, weights)


class WeightGatherPlan(NamedTuple):
    """Which device and row each of this device's physical experts is gathered from.

    Attributes:
      segments: rows from device to device.
      sent: [rows sent] int32, rows of this device in the order in which they are sent;
        then out of range.
      received: [physical experts of this device] int32, the received row of each; out
        of range for one that takes no row.
    """

    segments: Segments
    sent: jax.Array
    received: jax.Array


def plan_weight_gather(
    owner: jax.Array,
    source: jax.Array,
    num_devices: int,
    num_sent: int,
    axis_name: str,
) -> WeightGatherPlan:
    """Plans a gather of one row per physical expert; call in `jax.shard_map`.

    Args:
      owner: [physical experts] int32, the device that has the row; num_devices for a
        physical expert that takes none.
      source: [physical experts] int32, which of that device's rows it is.
      num_devices: devices that the physical experts are divided among.
      num_sent: rows that a device sends at most.
      axis_name: mesh axis of the devices.

    Returns:
      A `WeightGatherPlan`.
    """
    none = jnp.iinfo(jnp.int32).max
    sizes_DD = count_gathered_experts(owner, num_devices)
    segments = Segments(
        send_sizes=sizes_DD,
        input_offsets=jnp.cumsum(sizes_DD, axis=1) - sizes_DD,
        output_offsets=jnp.cumsum(sizes_DD, axis=0) - sizes_DD,
    )
    me = lax.axis_index(axis_name)
    physical_M = jnp.argsort(owner != me, stable=True)[:num_sent]
    sent_M = jnp.where(owner[physical_M] == me, source[physical_M], none)
    # Rows arrive by owner; physical experts that take none are last in that order.
    owner_I = owner.reshape(num_devices, -1)[me]
    order_I = jnp.argsort(owner_I, stable=True)
    position_I = jnp.arange(len(order_I), dtype=jnp.int32)
    received_I = jnp.zeros_like(position_I).at[order_I].set(position_I)
    return WeightGatherPlan(
        segments, sent_M, jnp.where(owner_I < num_devices, received_I, none)
    )


def count_gathered_experts(owner: jax.Array, num_devices: int) -> jax.Array:
    """Counts the rows that each device sends to each other.

    Args:
      owner: [physical experts] int32, the device that has the row; num_devices for a
        physical expert that takes none.
      num_devices: devices that the physical experts are divided among.

    Returns:
      [devices, devices] int32, from device to device.
    """
    device_D = jnp.arange(num_devices, dtype=jnp.int32)
    owner_DI = owner.reshape(num_devices, -1)
    return (owner_DI[None] == device_D[:, None, None]).sum(axis=2, dtype=jnp.int32)


def gather_weight_rows(
    rows: jax.Array, plan: WeightGatherPlan, axis_name: str, transport: Transport
) -> jax.Array:
    """Gathers a row for each of this device's physical experts; differentiable.

    Args:
      rows: [rows, ...], this device's.
      plan: from `plan_weight_gather`.
      axis_name: mesh axis of the devices.
      transport: see `exchange`.

    Returns:
      [physical experts of this device, ...]; zeros for one that takes no row.
    """
    num_received = len(plan.received)
    sent = take_or_zero(rows, plan.sent)
    received = exchange(sent, plan.segments, num_received, axis_name, transport)
    return take_or_zero(received, plan.received)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _gather_slices(
    rows: jax.Array,
    plan: WeightGatherPlan,
    count: int,
    axis_name: str,
    transport: Transport,
) -> jax.Array:
    """Applies `gather_weight_rows` to the features in `count` slices, one by one."""

    def gather(part: jax.Array) -> jax.Array:
        return gather_weight_rows(part, plan, axis_name, transport)

    return _by_slices(gather, rows, len(plan.received), count)


def _gather_forward(
    rows: jax.Array,
    plan: WeightGatherPlan,
    count: int,
    axis_name: str,
    transport: Transport,
) -> Any:
    gathered = _gather_slices(rows, plan, count, axis_name, transport)
    return gathered, (plan, rows.shape[0])


def _gather_backward(
    count: int, axis_name: str, transport: Transport, saved: Any, ct: jax.Array
) -> Any:
    plan, num_rows = saved

    def sum_replicas(part: jax.Array) -> jax.Array:
        # The function is linear, so its pullback is the same at any point.
        zeros = jnp.zeros((num_rows, *part.shape[1:]), part.dtype)
        _, pullback = jax.vjp(
            lambda rows: gather_weight_rows(rows, plan, axis_name, transport),
            *vary_alike(zeros, part)[:1],
        )
        return pullback(part)[0]

    return _by_slices(sum_replicas, ct, num_rows, count), None


_gather_slices.defvjp(_gather_forward, _gather_backward)


def _by_slices(
    function: Callable[[jax.Array], jax.Array],
    rows: jax.Array,
    num_results: int,
    count: int,
) -> jax.Array:
    """Applies `function`, [rows, n] to [results, n], to `count` slices of the features.

    The results start as some of the rows and not as zeros, although all of it is
    overwritten: XLA allocates zeros when a step starts, and holds them until here.
    """
    if count == 1:
        return function(rows)

    def in_slices(rows: jax.Array) -> jax.Array:
        flat = rows.reshape(len(rows), -1)
        size = flat.shape[1] // count

        def step(i: jax.Array, results: jax.Array) -> jax.Array:
            part = lax.dynamic_slice_in_dim(flat, i * size, size, axis=1)
            new = function(part)
            return lax.dynamic_update_slice_in_dim(results, new, i * size, axis=1)

        some = flat[jnp.arange(num_results) % len(rows)]
        results = lax.fori_loop(0, count, step, some)
        return results.reshape(num_results, *rows.shape[1:])

    # No loop there: see `runtime`.
    return on_cpu(function, in_slices, rows)


def _check(weights: PyTree, tables: ExpertTables, num_devices: int) -> None:
    if tables.expert_count.ndim != 1:
        raise ValueError(
            f"tables are of {tables.expert_count.shape[0]} layers; pass one layer's, "
            "tables.layer(i)."
        )
    for total, what in (
        (tables.num_physical_experts, "physical experts"),
        (tables.num_experts, "experts"),
    ):
        if num_devices < 1 or total % num_devices:
            raise ValueError(f"{num_devices=} must divide the {total} {what}.")
    check_held(weights, tables.num_experts, num_devices, "experts")


def check_held(weights: PyTree, total: int, num_devices: int, what: str) -> None:
    """Raises unless each leaf's first axis is this device's share of `total`.

    Args:
      weights: pytree of arrays.
      total: logical or physical experts of all devices.
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
                f"a device holds {held} of {total} {what}; their axis must come first."
            )
