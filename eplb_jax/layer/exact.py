"""Exact balance: choices to the slots of a `MicrobatchPlan`, and weights to these.

A device's slots are its physical experts and, after them, the extra ones, each for an
expert that it fetches. To dispatch and to the grouped products, slots are what physical
experts are otherwise.

Shape suffixes: see `eplb_jax`; here C choices of all tokens, and O slots of a device. X
are the slots of all devices, by expert.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eplb_jax.layer.axes import all_gather, axis_index, psum
from eplb_jax.layer.exchange import Transport, exchange
from eplb_jax.layer.ids import known_ids
from eplb_jax.layer.microbatch_plan import (
    MicrobatchPlan,
    check_num_fetched,
    plan_microbatch,
)
from eplb_jax.layer.parallel import ExpertParallel
from eplb_jax.layer.physical import (
    WeightGatherPlan,
    by_slices,
    gather_weight_rows,
    plan_weight_gather,
)
from eplb_jax.layer.routing import count_experts
from eplb_jax.layer.varying import is_typed, vary_alike
from eplb_jax.placement import ExpertTables, divisor_from


class Slots(NamedTuple):
    """Where the choices of this device go, and what its slots fetch.

    Attributes:
      slots: [tokens, top_k] int32, the slot of each choice, counted over all devices;
        -1 for padding.
      plan: the same on all devices.
      fetch: of the weights of this device's extra slots; None without any.
    """

    slots: jax.Array
    plan: MicrobatchPlan
    fetch: WeightGatherPlan | None


def plan_slots(experts: jax.Array, tables: ExpertTables, p: ExpertParallel) -> Slots:
    """Gathers what the devices' tokens have chosen, and plans with it.

    Args:
      experts: [tokens, top_k] logical experts; -1 for padding.
      tables: the tables of one layer.
      p: with several devices; call in `jax.shard_map` over its axis.

    Returns:
      `Slots`.

    Raises:
      ValueError: for more extra slots than experts.
    """
    assert p.axis_name is not None
    check_num_fetched(p.num_fetched, tables.num_experts)
    count_DE = all_gather(count_experts(experts, tables.num_experts), p.axis_name)
    plan = plan_microbatch(
        count_DE,
        tables,
        num_fetched=p.num_fetched,
        num_nodes=p.num_nodes,
        slack=p.slack,
    )
    fetch = None
    if p.num_fetched:
        source_S, held = plan.source.reshape(-1), tables.num_physical_experts
        per_device = held // p.num_devices
        fetch = plan_weight_gather(
            jnp.where(source_S < 0, p.num_devices, source_S // per_device),
            source_S % per_device,
            p.num_devices,
            # In the worst case all others fetch from this device.
            (p.num_devices - 1) * p.num_fetched,
            p.axis_name,
        )
    slots = choose_slots(experts, tables, plan, axis_index(p.axis_name))
    return Slots(slots, plan, fetch)


def choose_slots(
    experts: jax.Array, tables: ExpertTables, plan: MicrobatchPlan, device: jax.Array
) -> jax.Array:
    """Chooses the slot of each choice of a device: as many for each as planned.

    Args:
      experts: [tokens, top_k] logical experts; -1 for padding.
      tables: the tables of one layer.
      plan: from `plan_microbatch`, for counts with those of `experts`.
      device: [] int32, the device that has these tokens.

    Returns:
      [tokens, top_k] int32, from 0 to devices * slots of a device; -1 for padding.

    Examples:
      Three rows of expert 0: two stay on device 0, one goes to the extra slot of
      device 1, which is slot 3.

      >>> tables = ExpertTables.from_placement(jnp.arange(2), 2)
      >>> counts = jnp.array([[3, 0], [0, 1]])
      >>> plan = plan_microbatch(counts, tables, num_fetched=1)
      >>> choose_slots(jnp.array([[0], [0], [0]]), tables, plan, 0).ravel().tolist()
      [0, 0, 3]
    """
    num_devices, num_experts = len(plan.device_rows), tables.num_experts
    held_DI = tables.physical_to_logical_map.reshape(num_devices, -1)
    expert_X = jnp.concatenate([held_DI, plan.fetched], axis=1).reshape(-1)
    expert_C = known_ids(experts, num_experts).reshape(-1)
    # Choices and slots, both by expert: the first slot takes the first choices.
    slot_X = jnp.argsort(jnp.where(expert_X < 0, num_experts, expert_X), stable=True)
    choice_C = jnp.argsort(jnp.where(expert_C < 0, num_experts, expert_C), stable=True)
    rows_X = plan.rows[device].reshape(-1)[slot_X]
    slot_C = jnp.repeat(slot_X, rows_X, total_repeat_length=len(choice_C))
    slot_C = (
        jnp.zeros(len(choice_C), jnp.int32).at[choice_C].set(slot_C.astype(jnp.int32))
    )
    return jnp.where(expert_C < 0, -1, slot_C).reshape(experts.shape)


def count_rows(num_choices: int, p: ExpertParallel) -> int:
    """Rows of a device's buffer when all devices have equally many.

    Args:
      num_choices: tokens * top_k of a device.
      p: its settings.

    Raises:
      ValueError: if `num_rows` is less than that.
    """
    least = math.ceil(num_choices * (1 + p.slack))
    if p.num_rows is None:
        return least
    if p.num_rows < least:
        raise ValueError(
            f"num_rows={p.num_rows} contradicts balance='exact', by which each device "
            f"computes up to {least} rows, those of its {num_choices} choices with "
            f"slack={p.slack}; leave num_rows out."
        )
    return p.num_rows


def count_by_holder(
    tokens_per_slot: jax.Array, plan: MicrobatchPlan, num_physical: int, axis_name: str
) -> jax.Array:
    """Counts rows at the physical expert that their slot's weights come from.

    Args:
      tokens_per_slot: [devices * slots of a device] int32.
      plan: by which they were sent.
      num_physical: physical experts of all devices.
      axis_name: mesh axis of the devices.

    Returns:
      [physical experts] int32, the load that devices have without fetched experts.
    """
    num_devices, per_device = len(plan.fetched), num_physical // len(plan.fetched)
    rows_DO = tokens_per_slot.reshape(num_devices, -1)
    physical_DI = jnp.arange(num_physical, dtype=jnp.int32).reshape(num_devices, -1)
    of_DO = jnp.concatenate([physical_DI, plan.source], axis=1)
    assert rows_DO.shape[1] == per_device + plan.source.shape[1]

    def count(of: jax.Array, rows: jax.Array) -> jax.Array:
        room_S = vary_alike(jnp.zeros(num_physical, jnp.int32), of, rows)[0]
        of = jnp.where(of < 0, num_physical, of)
        return room_S.at[of].add(rows, mode="drop")

    if is_typed(of_DO):
        # Where types must say that all devices have the same values.
        me = axis_index(axis_name)
        return psum(count(of_DO[me], rows_DO[me]), axis_name)
    return count(of_DO.reshape(-1), rows_DO.reshape(-1))


def count_fetched(plan: MicrobatchPlan, axis_name: str) -> jax.Array:
    """Counts the experts that all devices fetch: [] int32."""
    count_D = (plan.fetched >= 0).sum(axis=1, dtype=jnp.int32)
    if is_typed(count_D):
        return psum(count_D[axis_index(axis_name)], axis_name)
    return count_D.sum(dtype=jnp.int32)


def add_fetched(
    weight: jax.Array,
    fetch: WeightGatherPlan,
    *,
    dtype: Any,
    axis_name: str,
    transport: Transport,
) -> jax.Array:
    """Fetches the weights of the extra slots; differentiable.

    The gradient of a fetched expert is sent to the device that the expert came from,
    and added there in float32.

    Args:
      weight: [physical experts of this device, ...].
      fetch: from `plan_slots`.
      dtype: of the arithmetic, in which weights are sent.
      axis_name: mesh axis of the devices.
      transport: see `exchange`.

    Returns:
      [slots of this device, ...], of that dtype; zeros for a slot that fetches none.
    """
    return _add_fetched(weight, fetch, jnp.dtype(dtype), axis_name, transport)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _add_fetched(
    weight: jax.Array,
    fetch: WeightGatherPlan,
    dtype: Any,
    axis_name: str,
    transport: Transport,
) -> jax.Array:
    weight = weight.astype(dtype)

    def gather(part: jax.Array) -> jax.Array:
        return gather_weight_rows(part, fetch, axis_name, transport)

    num_slots = len(fetch.received)
    fetched = by_slices(gather, weight, num_slots, _num_slices(weight, fetch))
    return jnp.concatenate([weight, fetched])


def _forward(
    weight: jax.Array,
    fetch: WeightGatherPlan,
    dtype: Any,
    axis_name: str,
    transport: Transport,
) -> Any:
    slots = _add_fetched(weight, fetch, dtype, axis_name, transport)
    return slots, (fetch, jnp.zeros(0, weight.dtype))


def _backward(
    dtype: Any, axis_name: str, transport: Transport, saved: Any, ct: jax.Array
) -> Any:
    del dtype
    fetch, like = saved
    num_held = len(ct) - len(fetch.received)
    # Slots in the order in which their rows arrived; those of none come last.
    order = jnp.argsort(fetch.received)
    back = fetch.segments.reversed()

    def send_home(part: jax.Array) -> jax.Array:
        part, num_sent = part[order], len(fetch.sent)
        returned = exchange(part, back, num_sent, axis_name, transport)
        returned = returned.astype(jnp.float32)
        zeros = jnp.zeros((num_held, *part.shape[1:]), jnp.float32)
        zeros, returned = vary_alike(zeros, returned)
        return zeros.at[fetch.sent].add(returned, mode="drop")

    own, fetched = ct[:num_held], ct[num_held:]
    home = by_slices(
        send_home, fetched, num_held, _num_slices(own, fetch), dtype=jnp.float32
    )
    return (own.astype(jnp.float32) + home).astype(like.dtype), None


_add_fetched.defvjp(_forward, _backward)


def _num_slices(weight: jax.Array, fetch: WeightGatherPlan) -> int:
    """So many that a buffer for all that may be sent is no larger than the slots."""
    least = -(-len(fetch.sent) // (len(weight) + len(fetch.received)))
    return divisor_from(max(1, math.prod(weight.shape[1:])), least)
