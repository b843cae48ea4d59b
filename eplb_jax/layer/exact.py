"""Exact balance: choices to the slots of a `MicrobatchPlan`.

A device's slots are its physical experts and, after them, the extra ones, each for an
expert that it fetches. To dispatch and to the grouped products, slots are what physical
experts are otherwise.

Shape suffixes: see `eplb_jax`; here C choices of all tokens, and O slots of a device. X
are the slots of all devices, by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eplb_jax.layer.axes import all_gather, axis_index, psum
from eplb_jax.layer.fetch import Fetch, plan_fetch
from eplb_jax.layer.ids import known_ids
from eplb_jax.layer.microbatch_plan import (
    MicrobatchPlan,
    check_num_fetched,
    plan_microbatch,
)
from eplb_jax.layer.parallel import ExpertParallel
from eplb_jax.layer.routing import count_experts
from eplb_jax.placement import ExpertTables
from eplb_jax.products import is_typed, vary_alike


class Slots(NamedTuple):
    """Where the choices of this device go, and what its slots fetch.

    Attributes:
      slots: [tokens, choices] int32, the slot of each choice, counted over all devices;
        -1 for padding.
      plan: the same on all devices.
      fetch: of the weights of this device's extra slots; None without any.
    """

    slots: jax.Array
    plan: MicrobatchPlan
    fetch: Fetch | None


def plan_slots(
    experts: jax.Array, tables: ExpertTables, p: ExpertParallel, num_shared: int
) -> Slots:
    """Gathers what the devices' tokens have chosen, and plans with it.

    Args:
      experts: [tokens, choices] logical experts; -1 for padding. The shared expert
        follows the others.
      tables: the tables of one layer.
      num_shared: 1 if there are choices of the shared expert, else 0.
      p: with several devices; call in `jax.shard_map` over its axis.

    Returns:
      `Slots`.

    Raises:
      ValueError: for more extra slots than experts.
    """
    assert p.axis_name is not None
    check_num_fetched(p.num_fetched, tables.num_experts)
    num_experts = tables.num_experts + num_shared
    count_DE = all_gather(count_experts(experts, num_experts), p.axis_name)
    plan = plan_microbatch(
        count_DE[:, : tables.num_experts],
        tables,
        shared=count_DE[:, -1] if num_shared else None,
        num_fetched=p.num_fetched,
        num_nodes=p.num_nodes,
        slack=p.slack,
    )
    fetch = None
    if p.num_fetched:
        # The shared expert follows the physical experts of each device.
        per_device = tables.num_physical_experts // p.num_devices
        source = plan.source + num_shared * (plan.source // per_device)
        source = jnp.where(plan.source < 0, -1, source)
        fetch = plan_fetch(source, per_device + num_shared, p.axis_name)
    slots = choose_slots(experts, num_experts, plan, axis_index(p.axis_name))
    return Slots(slots, plan, fetch)


def choose_slots(
    experts: jax.Array, num_experts: int, plan: MicrobatchPlan, device: jax.Array
) -> jax.Array:
    """Chooses the slot of each choice of a device: as many for each as planned.

    Args:
      experts: [tokens, choices] logical experts; -1 for padding.
      num_experts: logical experts, the shared one among them if it is planned.
      plan: from `plan_microbatch`, for counts with those of `experts`.
      device: [] int32, the device that has these tokens.

    Returns:
      [tokens, choices] int32, from 0 to devices * slots of a device; -1 for padding.

    Examples:
      Three rows of expert 0: two stay on device 0, one goes to the extra slot of
      device 1, which is slot 3.

      >>> tables = ExpertTables.from_placement(jnp.arange(2), 2)
      >>> counts = jnp.array([[3, 0], [0, 1]])
      >>> plan = plan_microbatch(counts, tables, num_fetched=1)
      >>> choose_slots(jnp.array([[0], [0], [0]]), 2, plan, 0).ravel().tolist()
      [0, 0, 3]
    """
    expert_X = plan.experts.reshape(-1)
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
      [physical experts] int32, the load that devices have without fetched experts; rows
      of the shared expert do not count.
    """
    num_devices, per_device = len(plan.fetched), num_physical // len(plan.fetched)
    rows_DO = tokens_per_slot.reshape(num_devices, -1)
    physical_DI = jnp.arange(num_physical, dtype=jnp.int32).reshape(num_devices, -1)
    num_shared = rows_DO.shape[1] - per_device - plan.source.shape[1]
    shared_D = jnp.full((num_devices, num_shared), -1, jnp.int32)
    of_DO = jnp.concatenate([physical_DI, shared_D, plan.source], axis=1)

    def count(of_O: jax.Array, rows_O: jax.Array) -> jax.Array:
        room_S = vary_alike(jnp.zeros(num_physical, jnp.int32), of_O, rows_O)[0]
        of_O = jnp.where(of_O < 0, num_physical, of_O)
        return room_S.at[of_O].add(rows_O, mode="drop")

    return _over_devices(count, axis_name, of_DO, rows_DO)


def count_fetched(plan: MicrobatchPlan, axis_name: str) -> jax.Array:
    """Counts the experts that all devices fetch: [] int32."""

    def count(fetched_X: jax.Array) -> jax.Array:
        return (fetched_X >= 0).sum(dtype=jnp.int32)

    return _over_devices(count, axis_name, plan.fetched)


def count_moved(plan: MicrobatchPlan, axis_name: str) -> jax.Array:
    """Counts the rows that are computed on another device than their token's."""
    rows_DD = plan.rows.sum(axis=2, dtype=jnp.int32)
    moved_DD = jnp.where(np.eye(len(rows_DD), dtype=bool), 0, rows_DD)
    return _over_devices(lambda moved: moved.sum(dtype=jnp.int32), axis_name, moved_DD)


def _over_devices(
    count: Callable[..., jax.Array], axis_name: str, *each: jax.Array
) -> jax.Array:
    """Counts over the rows, [devices, n], of arrays that all devices have."""
    if is_typed(each[0]):
        # Where types must say that all devices have the same values.
        me = axis_index(axis_name)
        return psum(count(*(rows[me] for rows in each)), axis_name)
    return count(*(rows.reshape(-1) for rows in each))
