"""Which replica of its expert each choice of a token goes to.

The result depends only on values that are the same on every device, the tables and
gathered counts, and on the device's position. Equal tokens at equal positions go to the
same replicas, and a step that is run again gives the same result.

Shape suffixes: see `eplb_jax`; here C choices of all tokens, C = T * K.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.layer.ids import known_ids
from eplb_jax.layer.routing import count_experts
from eplb_jax.placement import ExpertTables, check_choices, mix_bits
from eplb_jax.products import vary_alike

ReplicaChoice = Literal["spread", "nearest", "balanced"]

# Each iteration halves the distance to the shares that suit every expert; on recorded
# prefill loads eight come within half a percent of what forty reach.
_NUM_ITERATIONS = 8
_STEP = 0.5


def choose_physical_experts(
    experts: jax.Array,
    tables: ExpertTables,
    *,
    choice: ReplicaChoice = "spread",
    num_devices: int = 1,
    num_nodes: int = 1,
    axis_name: str | None = None,
) -> jax.Array:
    """Chooses the physical expert that each choice of each token is sent to.

    Replica choices:
      - `"spread"`: the choices of an expert go to its replicas in rounds, each replica
        once per round, in an order that differs between rounds and between experts.
        The load is even, and the top_k choices of a token are independent.
      - `"nearest"`: to a replica on this device; if there is none, to those on this
        node in turn; if there is none either, to all replicas in turn.
      - `"balanced"`: in the shares that even out the loads of the devices for the
        tokens of this batch on all devices. Costs one gather of [experts] integers.

    Args:
      experts: [tokens, top_k] logical experts; an id outside [0, experts), such as -1,
        for a token that is padding.
      tables: the tables of one layer.
      choice: see above.
      num_devices: devices that the physical experts are divided among, in order.
      num_nodes: nodes that the devices are divided among, in order; for `"nearest"`.
      axis_name: mesh axis of the devices, inside `jax.shard_map`; None on one device,
        or if `experts` holds the tokens of all devices.

    Returns:
      [tokens, top_k] int32 physical experts; -1 for padding.

    Raises:
      ValueError: for an unknown choice, tables of several layers, devices that do not
        divide the physical experts, or nodes that do not divide the devices.

    Examples:
      Physical experts 0 and 2 are replicas of expert 0:

      >>> tables = ExpertTables.from_placement(jnp.array([0, 1, 0]), 2)
      >>> choose_physical_experts(jnp.array([[0, 1], [0, 1], [0, -1]]), tables).tolist()
      [[2, 1], [0, 1], [0, -1]]
    """
    _check(tables, choice, num_devices, num_nodes)
    experts = known_ids(experts, tables.num_experts)
    if tables.max_replicas == 1 or not experts.size:
        return jnp.where(experts >= 0, tables.logical_to_physical_map[experts, 0], -1)
    expert_C = experts.reshape(-1)
    ordinal_C = _ordinals(expert_C)
    device = jnp.int32(0) if axis_name is None else lax.axis_index(axis_name)
    physical_ER = tables.logical_to_physical_map
    if choice == "balanced":
        shares_ER, ordinal_C = _shares_and_ordinals(
            expert_C, ordinal_C, tables, num_devices, axis_name
        )
        upper_ER = jnp.cumsum(shares_ER, axis=1)
        # Not past the last replica, however the sum of shares is rounded.
        last_E = tables.expert_count - 1
        is_past_CR = upper_ER[expert_C] <= ordinal_C.astype(jnp.float32)[:, None] + 0.5
        rank_C = jnp.minimum(is_past_CR.sum(axis=1, dtype=jnp.int32), last_E[expert_C])
    else:
        count_E = tables.expert_count
        if choice == "nearest":
            physical_ER, count_E = _nearest(tables, device, num_devices, num_nodes)
        count_C = count_E[expert_C]
        round_C = (ordinal_C // count_C).astype(jnp.uint32)
        expert_bits_C = mix_bits(expert_C.astype(jnp.uint32) + 1)
        turn_C = mix_bits(round_C ^ expert_bits_C) % count_C.astype(jnp.uint32)
        rank_C = (ordinal_C + device + turn_C.astype(jnp.int32)) % count_C
    physical_C = physical_ER[expert_C, rank_C]
    return jnp.where(expert_C >= 0, physical_C, -1).reshape(experts.shape)


def balanced_shares(
    counts: jax.Array, tables: ExpertTables, num_devices: int
) -> jax.Array:
    """Divides each expert's tokens among its replicas so that devices are even.

    Water-filling: every expert fills its replicas up to one level, above a floor that
    is the load its devices have from other experts. All experts do so at once and go
    half of the way, several times. The result is the best of these iterates, the even
    split included.

    Args:
      counts: [experts] tokens of each expert.
      tables: the tables of one layer.
      num_devices: devices that the physical experts are divided among, in order.

    Returns:
      [experts, max_replicas] float32, not negative; a row adds up to its count.

    Examples:
      Devices 0 and 1 both hold expert 0, and device 0 also serves expert 1:

      >>> tables = ExpertTables.from_placement(jnp.array([0, 1, 0, 2]), 3)
      >>> counts = jnp.array([8, 6, 0])
      >>> balanced_shares(counts, tables, 2)[0].round().tolist()
      [1.0, 7.0]
    """
    per_device = tables.num_physical_experts // num_devices
    physical_ER = tables.logical_to_physical_map
    is_replica_ER = physical_ER >= 0
    device_ER = jnp.where(is_replica_ER, physical_ER // per_device, num_devices)
    count_E1 = counts.astype(jnp.float32)[:, None]
    position_1R = jnp.arange(1, physical_ER.shape[1] + 1, dtype=jnp.float32)[None]

    def loads(share_ER: jax.Array) -> jax.Array:
        load_D = jnp.zeros(num_devices + 1, jnp.float32).at[device_ER].add(share_ER)
        return load_D[:num_devices]

    def pour(
        carry: tuple[jax.Array, ...], _: None
    ) -> tuple[tuple[jax.Array, ...], None]:
        share_ER, best_ER, best = carry
        load_D = loads(share_ER)
        most = load_D.max()
        best_ER = jnp.where(most < best, share_ER, best_ER)
        best = jnp.minimum(most, best)
        floor_ER = jnp.append(load_D, 0.0)[device_ER] - share_ER
        floor_ER = jnp.where(is_replica_ER, floor_ER, jnp.inf)
        # For every n, the level at which the n lowest floors are covered; the right n
        # is the largest one whose level is above its own floor.
        sorted_ER = jnp.sort(floor_ER, axis=1)
        filled_ER = jnp.cumsum(jnp.where(jnp.isinf(sorted_ER), 0.0, sorted_ER), axis=1)
        level_ER = (count_E1 + filled_ER) / position_1R
        is_covered_ER = (level_ER > sorted_ER).astype(jnp.int32)
        n_E1 = jnp.maximum(is_covered_ER.sum(axis=1, keepdims=True) - 1, 0)
        level_E1 = jnp.take_along_axis(level_ER, n_E1, axis=1)
        new_ER = jnp.where(is_replica_ER, jnp.maximum(level_E1 - floor_ER, 0.0), 0.0)
        return (share_ER + _STEP * (new_ER - share_ER), best_ER, best), None

    even_ER = count_E1 / tables.expert_count.astype(jnp.float32)[:, None]
    even_ER = jnp.where(is_replica_ER, even_ER, 0.0)
    carry = vary_alike(even_ER, even_ER, jnp.float32(jnp.inf), tables)[:3]
    # The last iteration only evaluates the result of the one before it.
    return lax.scan(pour, carry, None, length=_NUM_ITERATIONS + 1)[0][1]


def _ordinals(expert_C: jax.Array) -> jax.Array:
    """Counts, for each choice, the earlier choices of the same expert."""
    position_C = jnp.arange(len(expert_C), dtype=jnp.int32)
    order_C = jnp.argsort(expert_C, stable=True).astype(jnp.int32)
    sorted_C = expert_C[order_C]
    is_first_C = jnp.concatenate([jnp.ones(1, bool), sorted_C[1:] != sorted_C[:-1]])
    first_C = lax.cummax(jnp.where(is_first_C, position_C, 0))
    return jnp.zeros_like(position_C).at[order_C].set(position_C - first_C)


def _shares_and_ordinals(
    expert_C: jax.Array,
    ordinal_C: jax.Array,
    tables: ExpertTables,
    num_devices: int,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Shares for the counts of all devices, and ordinals among all their choices."""
    count_E = count_experts(expert_C, tables.num_experts)
    if axis_name is not None:
        count_DE = lax.all_gather(count_E, axis_name)
        before_DE = jnp.cumsum(count_DE, axis=0) - count_DE
        ordinal_C = ordinal_C + before_DE[lax.axis_index(axis_name)][expert_C]
        count_E = count_DE.sum(axis=0)
    return balanced_shares(count_E, tables, num_devices), ordinal_C


def _nearest(
    tables: ExpertTables, device: jax.Array, num_devices: int, num_nodes: int
) -> tuple[jax.Array, jax.Array]:
    """Returns each expert's replicas, nearest first, and how many are nearest."""
    physical_ER = tables.logical_to_physical_map
    at_ER = physical_ER // (tables.num_physical_experts // num_devices)
    per_node = num_devices // num_nodes
    is_far_ER = (at_ER // per_node != device // per_node).astype(jnp.int32)
    distance_ER = (at_ER != device).astype(jnp.int32) + is_far_ER
    distance_ER = jnp.where(physical_ER >= 0, distance_ER, 3)
    order_ER = jnp.argsort(distance_ER, axis=1, stable=True)
    nearest_E1 = distance_ER.min(axis=1, keepdims=True)
    count_E = (distance_ER == nearest_E1).sum(axis=1, dtype=jnp.int32)
    return jnp.take_along_axis(physical_ER, order_ER, axis=1), count_E


def _check(
    tables: ExpertTables, choice: ReplicaChoice, num_devices: int, num_nodes: int
) -> None:
    check_choices(choice=(choice, ReplicaChoice))
    if tables.expert_count.ndim != 1:
        raise ValueError(
            f"tables are of {tables.expert_count.shape[0]} layers; pass one layer's, "
            "tables.layer(i)."
        )
    if num_devices < 1 or tables.num_physical_experts % num_devices:
        raise ValueError(
            f"{num_devices=} must divide the {tables.num_physical_experts} physical "
            "experts of the tables."
        )
    if num_nodes < 1 or num_devices % num_nodes:
        raise ValueError(f"{num_nodes=} must divide {num_devices=}.")
