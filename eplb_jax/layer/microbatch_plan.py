"""A plan for one microbatch by which every device computes the same number of rows.

A placement fits the loads that were measured before; the next microbatch differs. Here
the router's counts of this very microbatch say what is computed where. First the
replicas that are there share their rows anew. Then devices that have too many rows give
them to devices that have too few, and these fetch the weights of experts that they do
not hold.

Everything is sorts, sums and comparisons of integers, without a loop that is left in
the program. Devices that have gathered the same counts make the same plan, bit by bit.

Shape suffixes: see `eplb_jax`; here O slots of a device. These are its physical
experts, then the one of the shared expert, if there is one, then X, its extra slots.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eplb_jax.layer.replica_rows import Held, hold, level_replicas, share_evenly
from eplb_jax.layer.shared_rows import spread_shared
from eplb_jax.layer.surplus import give_surplus
from eplb_jax.placement import ExpertTables, is_traced


class MicrobatchPlan(NamedTuple):
    """Who computes what in one microbatch; the same on all devices.

    Attributes:
      fetched: [devices, num_fetched] int32, the logical expert of each extra slot; -1
        for none.
      source: [devices, num_fetched] int32, the physical expert whose weights an extra
        slot takes; -1 for none.
      experts: [devices, slots] int32, the logical expert of each slot of each device:
        its physical experts, the shared expert if it is planned, which counts as one
        more logical expert, and the extra slots; -1 for none.
      rows: [devices, devices, slots] int32, rows that each device (first axis) sends to
        each slot of each device.
      device_rows: [devices] int32, rows that each device computes.
    """

    fetched: jax.Array
    source: jax.Array
    experts: jax.Array
    rows: jax.Array
    device_rows: jax.Array


def plan_microbatch(
    counts: jax.Array,
    tables: ExpertTables,
    *,
    num_fetched: int,
    num_nodes: int = 1,
    slack: float = 0.0,
    capacity: ArrayLike | None = None,
    shared: jax.Array | None = None,
) -> MicrobatchPlan:
    """Plans which device computes which rows of one microbatch.

    In this order: no row is dropped; no device computes more than its share of the
    rows, which is `ceil(rows / devices)` if all are equally fast; few experts are
    fetched, and few of them from other nodes; rows of an expert that a device both has
    and computes stay there. Where `num_fetched` extra slots do not suffice for equal
    rows, the fullest device has as few as the plan finds; `device_rows` tells.

    Args:
      counts: [devices, experts] int32, rows that each device has for each expert.
      tables: the tables of one layer; the devices hold the physical experts in order.
      num_fetched: extra slots of a device, each for one expert that it fetches.
      num_nodes: nodes that the devices are divided among, in order.
      slack: fraction of its share by which a device may exceed it; with some slack
        fewer experts are fetched.
      capacity: [devices] relative speeds, above 0: shares are proportional to them.
        None: all devices are equally fast.
      shared: [devices] int32, rows that each device has for the shared expert, which
        all devices hold. Devices with few other rows compute more of them, so that
        fewer experts are fetched. None: it is not planned.

    Returns:
      A `MicrobatchPlan`.

    Raises:
      ValueError: for shapes that do not fit each other, nodes that do not divide the
        devices, `num_fetched` outside [0, experts], a negative slack, and, outside jit,
        for a capacity that is not above 0.

    Examples:
      All eight rows are for expert 0, on device 0; the others fetch it:

      >>> tables = ExpertTables.from_placement(jnp.arange(4), 4)
      >>> counts = jnp.zeros((4, 4), jnp.int32).at[:, 0].set(2)
      >>> plan = plan_microbatch(counts, tables, num_fetched=1)
      >>> plan.fetched.ravel().tolist(), plan.device_rows.tolist()
      ([-1, 0, 0, 0], [2, 2, 2, 2])
    """
    counts = jnp.asarray(counts)
    if capacity is not None:
        capacity = jnp.asarray(capacity, jnp.float32)
    if shared is not None:
        shared = jnp.asarray(shared)
    _check(counts, tables, num_fetched, num_nodes, slack, capacity, shared)
    return _plan(
        counts,
        tables,
        capacity,
        shared,
        num_fetched=num_fetched,
        num_nodes=num_nodes,
        slack=float(slack),
    )


@functools.partial(jax.jit, static_argnames=("num_fetched", "num_nodes", "slack"))
def _plan(
    counts: jax.Array,
    tables: ExpertTables,
    capacity: jax.Array | None,
    shared: jax.Array | None,
    *,
    num_fetched: int,
    num_nodes: int,
    slack: float,
) -> MicrobatchPlan:
    counts_DE = counts.astype(jnp.int32)
    num_devices, num_experts = counts_DE.shape
    total_E = counts_DE.sum(axis=0, dtype=jnp.int32)
    total = total_E.sum(dtype=jnp.int32)
    if shared is not None:
        total += shared.sum(dtype=jnp.int32)
    target_D = _targets(total, num_devices, slack, capacity)
    held = hold(tables, num_devices)
    rows_DI = share_evenly(total_E, held)
    # Of devices that have too few, shared rows make up for it.
    may_pull = slack == 0 and shared is None
    rows_DI = level_replicas(rows_DI, held, target_D, num_experts, may_pull=may_pull)
    experts, rows = [held.expert_DI], []
    if shared is not None:
        shared_D = shared.astype(jnp.int32)
        counts_DE = jnp.concatenate([counts_DE, shared_D[:, None]], axis=1)
        experts.append(jnp.full((num_devices, 1), num_experts, jnp.int32))
        load_D = rows_DI.sum(axis=1, dtype=jnp.int32)
        shared_D = spread_shared(load_D, target_D, shared_D, num_fetched)
        rows.append(shared_D[:, None])
        target_D -= shared_D
    if num_fetched:
        rows_DI, fetched_DX, extra_DX = give_surplus(
            rows_DI, held.expert_DI, target_D, num_fetched, num_nodes
        )
    else:
        fetched_DX = jnp.full((num_devices, 0), -1, jnp.int32)
        extra_DX = jnp.zeros((num_devices, 0), jnp.int32)
    expert_DO = jnp.concatenate([*experts, fetched_DX], axis=1)
    rows_DO = jnp.concatenate([rows_DI, *rows, extra_DX], axis=1)
    return MicrobatchPlan(
        fetched=fetched_DX,
        source=_sources(fetched_DX, held, tables, num_nodes),
        experts=expert_DO,
        rows=_rows_by_sender(counts_DE, expert_DO, rows_DO),
        device_rows=rows_DO.sum(axis=1, dtype=jnp.int32),
    )


def _targets(
    total: jax.Array, num_devices: int, slack: float, capacity: jax.Array | None
) -> jax.Array:
    """The most rows that each device shall compute: [devices] int32."""
    if capacity is None:
        share = -(-total // num_devices)
        share_D = jnp.broadcast_to(share, (num_devices,))
    else:
        # What rounding leaves, or takes too much, is spread in units over the devices.
        part_D = capacity / capacity.sum()
        share_D = jnp.floor(total.astype(jnp.float32) * part_D).astype(jnp.int32)
        rest = total - share_D.sum(dtype=jnp.int32)
        device_D = jnp.arange(num_devices, dtype=jnp.int32)
        share_D += rest // num_devices
        share_D += (device_D < rest % num_devices).astype(jnp.int32)
        share_D = jnp.maximum(share_D, 0)
    if slack:
        more_D = jnp.floor(share_D.astype(jnp.float32) * jnp.float32(slack))
        share_D += more_D.astype(jnp.int32)
    return share_D


def _rows_by_sender(
    counts_DE: jax.Array, expert_DO: jax.Array, rows_DO: jax.Array
) -> jax.Array:
    """Which of each sender's rows go to which slot: [senders, devices, slots] int32.

    Rows stay where a device has and computes some of an expert. The rest of each expert
    lies on one line twice, divided by senders and by slots: what overlaps is sent.
    """
    num_experts = counts_DE.shape[1]
    expert_E = jnp.arange(num_experts, dtype=jnp.int32)
    is_of_DOE = expert_DO[:, :, None] == expert_E[None, None]
    wanted_DE = jnp.where(is_of_DOE, rows_DO[:, :, None], 0).sum(axis=1)
    stay_DE = jnp.minimum(counts_DE, wanted_DE)
    sent_DE, wanted_DE = counts_DE - stay_DE, wanted_DE - stay_DE
    of_expert_E = sent_DE.sum(axis=0)
    first_E = jnp.cumsum(of_expert_E) - of_expert_E
    sent_end_DE = first_E[None] + _sums_so_far(sent_DE)
    wanted_end_DE = first_E[None] + _sums_so_far(wanted_DE)

    expert_DO = jnp.where(expert_DO < 0, num_experts - 1, expert_DO)
    is_used_DO = rows_DO > 0

    def at_slots(value_DE: jax.Array) -> jax.Array:
        at_DO = jnp.take_along_axis(value_DE, expert_DO, axis=1)
        return jnp.where(is_used_DO, at_DO, 0)

    end_DO = at_slots(wanted_end_DE)
    start_DO = end_DO - at_slots(wanted_DE)
    # Where the rows of each sender begin and end, of the expert of each slot.
    bound_DE = jnp.concatenate([first_E[None], sent_end_DE])
    bound_DDO = bound_DE[:, expert_DO]
    overlap_DDO = jnp.minimum(bound_DDO[1:], end_DO[None])
    overlap_DDO -= jnp.maximum(bound_DDO[:-1], start_DO[None])
    is_here_DD = np.eye(len(counts_DE), dtype=bool)
    stay_DDO = jnp.where(is_here_DD[:, :, None], at_slots(stay_DE)[None], 0)
    return jnp.maximum(overlap_DDO, 0) + stay_DDO


def _sums_so_far(value_DE: jax.Array) -> jax.Array:
    """Inclusive sums over devices: in blocks of devices, then over the blocks.

    XLA for CPUs computes `cumsum` in quadratic time, and each of the many small
    operations of `lax.associative_scan` on its own.
    """
    num_devices, num_experts = value_DE.shape
    block = math.isqrt(num_devices - 1) + 1
    padded_DE = jnp.pad(value_DE, ((0, -num_devices % block), (0, 0)))
    value_ADE = padded_DE.reshape(-1, block, num_experts)
    is_up_to_DD = np.tri(block, dtype=bool)[None, :, :, None]
    inside_ADE = jnp.where(is_up_to_DD, value_ADE[:, None], 0).sum(axis=2)
    is_before_AA = np.tri(len(value_ADE), k=-1, dtype=bool)[:, :, None]
    before_AE = jnp.where(is_before_AA, value_ADE.sum(axis=1)[None], 0).sum(axis=1)
    sums_DE = (before_AE[:, None] + inside_ADE).reshape(-1, num_experts)
    return sums_DE[:num_devices]


def _sources(
    fetched_DX: jax.Array, held: Held, tables: ExpertTables, num_nodes: int
) -> jax.Array:
    """The replica that each fetched expert is read from: [devices, num_fetched] int32.

    One on the same node if there is one. Devices take turns among equally near ones.
    """
    num_devices, per_device = held.expert_DI.shape
    physical_DXR = tables.logical_to_physical_map[fetched_DX]
    per_node = num_devices // num_nodes
    device_D11 = jnp.arange(num_devices, dtype=jnp.int32)[:, None, None]
    is_near_DXR = physical_DXR // per_device // per_node == device_D11 // per_node
    replica_R = jnp.arange(tables.max_replicas, dtype=jnp.int32)
    turn_DXR = (replica_R[None, None] + device_D11) % tables.max_replicas
    cost_DXR = turn_DXR + jnp.where(is_near_DXR, 0, tables.max_replicas)
    cost_DXR = jnp.where(physical_DXR < 0, 2 * tables.max_replicas, cost_DXR)
    best_DX = jnp.argmin(cost_DXR, axis=2)
    source_DX = jnp.take_along_axis(physical_DXR, best_DX[..., None], axis=2)[..., 0]
    return jnp.where(fetched_DX < 0, -1, source_DX)


def _check(
    counts: jax.Array,
    tables: ExpertTables,
    num_fetched: int,
    num_nodes: int,
    slack: float,
    capacity: jax.Array | None,
    shared: jax.Array | None,
) -> None:
    if tables.expert_count.ndim != 1:
        raise ValueError(
            f"tables are of {tables.expert_count.shape[0]} layers; pass one layer's, "
            "tables.layer(i)."
        )
    num_experts = tables.num_experts
    if counts.ndim != 2 or counts.shape[1] != num_experts or not len(counts):
        raise ValueError(
            f"counts has shape {counts.shape}; it must be [devices, experts], with the "
            f"{num_experts} experts of the tables."
        )
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(f"counts are {counts.dtype}; they must be integers.")
    num_devices = len(counts)
    if tables.num_physical_experts % num_devices:
        raise ValueError(
            f"The {num_devices} devices of counts must divide the "
            f"{tables.num_physical_experts} physical experts of the tables."
        )
    if num_nodes < 1 or num_devices % num_nodes:
        raise ValueError(
            f"{num_nodes=} must divide the {num_devices} devices of counts."
        )
    check_num_fetched(num_fetched, num_experts)
    check_slack(slack)
    if shared is not None and shared.shape != (num_devices,):
        raise ValueError(
            f"shared has shape {shared.shape}; it must have one entry for each of the "
            f"{num_devices} devices of counts."
        )
    if capacity is None:
        return
    if capacity.shape != (num_devices,):
        raise ValueError(
            f"capacity has shape {capacity.shape}; it must have one entry for each of "
            f"the {num_devices} devices of counts."
        )
    if not is_traced(capacity):
        values = np.asarray(capacity)
        for device in np.flatnonzero(~(np.isfinite(values) & (values > 0)))[:1]:
            raise ValueError(
                f"capacity of device {device} is {values[device]}; it must be above 0. "
                "Leave a device without capacity out of the mesh."
            )


def check_num_fetched(num_fetched: int, num_experts: int) -> None:
    """Raises unless a device may have that many extra slots."""
    if not 0 <= num_fetched <= num_experts:
        raise ValueError(
            f"{num_fetched=} must be at least 0 and at most the {num_experts} experts; "
            "a few suffice."
        )


def check_slack(slack: float) -> None:
    """Raises unless a device may exceed its share by that fraction."""
    if not 0 <= slack < float("inf"):
        raise ValueError(
            f"{slack=} must be at least 0 and finite: the fraction by which a device "
            "may exceed its share."
        )
