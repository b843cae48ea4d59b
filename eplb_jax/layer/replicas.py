"""Which replica of its expert each choice of a token goes to.

All of it depends only on values that every rank knows: the tables, the rank's own
position, and counts that were gathered. Two ranks with the same tokens at the same
position decide alike, and so does the same step when it is run again.

Shape suffixes: T tokens, K choices of a token, N = T * K, E experts, C replicas of an
expert at most, D devices.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.layer.routing import count_experts
from eplb_jax.layer.varying import vary_alike
from eplb_jax.placement import ExpertTables, mix_bits

ReplicaChoice = Literal["spread", "nearest", "balanced"]

# Each halves the distance to where every expert is content with its shares; on
# recorded prefill loads eight come within half a percent of what forty reach.
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
    """The slot that each choice of each token is sent to.

    Choices:
      - `"spread"`: the choices of an expert go to its replicas in rounds, each replica
        once a round, in an order that changes from round to round and from expert to
        expert: evenly, and independently for the k choices of a token.
      - `"nearest"`: to a replica on this device; where there is none, to those on this
        node, in turn; where there is none either, to all, in turn.
      - `"balanced"`: to replicas in such shares that, with the tokens that this batch
        has in all devices, the devices' loads become even. Costs one gather of
        [experts] integers.

    Args:
      experts: [tokens, k] int32 logical experts; -1 for a token that is padding.
      tables: of one layer.
      choice: see above.
      num_devices: devices that the slots are divided among, in order.
      num_nodes: nodes that the devices are divided among, in order; for `"nearest"`.
      axis_name: mesh axis of the devices, inside `jax.shard_map`; None on one device
        or where the tokens of all devices are here.

    Returns:
      [tokens, k] int32 slots; -1 where `experts` is.

    Raises:
      ValueError: for an unknown choice, tables of several layers, devices that do not
        divide the slots, or nodes that do not divide the devices.

    Examples:
      Expert 0 is in slots 0 and 2:

      >>> tables = ExpertTables.from_placement(jnp.array([0, 1, 0]), 2)
      >>> choose_physical_experts(jnp.array([[0, 1], [0, 1], [0, -1]]), tables).tolist()
      [[2, 1], [0, 1], [0, -1]]
    """
    _check(tables, choice, num_devices, num_nodes)
    if tables.max_replicas == 1:
        return jnp.where(experts >= 0, tables.logical_to_physical_map[experts, 0], -1)
    expert_N = experts.reshape(-1).astype(jnp.int32)
    ordinal_N = _ordinals(expert_N)
    device = jnp.int32(0) if axis_name is None else lax.axis_index(axis_name)
    slots_EC = tables.logical_to_physical_map
    if choice == "balanced":
        shares_EC, ordinal_N = _balance(
            expert_N, ordinal_N, tables, num_devices, axis_name
        )
        upper_EC = jnp.cumsum(shares_EC, axis=1)
        # Not past the last replica, whatever rounding does to the sum of shares.
        last_E = tables.expert_count - 1
        is_past_NC = upper_EC[expert_N] <= ordinal_N.astype(jnp.float32)[:, None] + 0.5
        rank_N = jnp.minimum(is_past_NC.sum(axis=1, dtype=jnp.int32), last_E[expert_N])
    else:
        count_E = tables.expert_count
        if choice == "nearest":
            slots_EC, count_E = _nearest(tables, device, num_devices, num_nodes)
        count_N = count_E[expert_N]
        round_N = (ordinal_N // count_N).astype(jnp.uint32)
        expert_bits_N = mix_bits(expert_N.astype(jnp.uint32) + 1)
        turn_N = mix_bits(round_N ^ expert_bits_N) % count_N.astype(jnp.uint32)
        rank_N = (ordinal_N + device + turn_N.astype(jnp.int32)) % count_N
    slot_N = slots_EC[expert_N, rank_N]
    return jnp.where(expert_N >= 0, slot_N, -1).reshape(experts.shape)


def balanced_shares(
    counts: jax.Array, tables: ExpertTables, num_devices: int
) -> jax.Array:
    """How many of its tokens each replica should get for the devices to be even.

    Every expert pours its tokens onto its replicas as water into a vessel whose floor
    is what the devices carry otherwise; all experts do so at once, half way, a few
    times over; the best of these is the result, the even split included.

    Args:
      counts: [experts] tokens.
      tables: of one layer.
      num_devices: devices that the slots are divided among, in order.

    Returns:
      [experts, max_replicas] float32, not negative; a row adds up to its count.

    Examples:
      Devices 0 and 1 both hold expert 0, and device 0 also has expert 1 to serve:

      >>> tables = ExpertTables.from_placement(jnp.array([0, 1, 0, 2]), 3)
      >>> counts = jnp.array([8, 6, 0])
      >>> balanced_shares(counts, tables, 2)[0].round().tolist()
      [1.0, 7.0]
    """
    per_device = tables.num_physical_experts // num_devices
    slots_EC = tables.logical_to_physical_map
    is_slot_EC = slots_EC >= 0
    device_EC = jnp.where(is_slot_EC, slots_EC // per_device, num_devices)
    count_E1 = counts.astype(jnp.float32)[:, None]
    position_1C = jnp.arange(1, slots_EC.shape[1] + 1, dtype=jnp.float32)[None]

    def loads(share_EC: jax.Array) -> jax.Array:
        load_D = jnp.zeros(num_devices + 1, jnp.float32).at[device_EC].add(share_EC)
        return load_D[:num_devices]

    def pour(
        carry: tuple[jax.Array, ...], _: None
    ) -> tuple[tuple[jax.Array, ...], None]:
        share_EC, best_EC, best = carry
        load_D = loads(share_EC)
        most = load_D.max()
        best_EC = jnp.where(most < best, share_EC, best_EC)
        best = jnp.minimum(most, best)
        floor_EC = jnp.append(load_D, 0.0)[device_EC] - share_EC
        floor_EC = jnp.where(is_slot_EC, floor_EC, jnp.inf)
        # The level at which the n lowest floors are covered, for every n; the right n
        # is the largest whose level lies above its own floor.
        sorted_EC = jnp.sort(floor_EC, axis=1)
        filled_EC = jnp.cumsum(jnp.where(jnp.isinf(sorted_EC), 0.0, sorted_EC), axis=1)
        level_EC = (count_E1 + filled_EC) / position_1C
        is_covered_EC = (level_EC > sorted_EC).astype(jnp.int32)
        n_E1 = jnp.maximum(is_covered_EC.sum(axis=1, keepdims=True) - 1, 0)
        level_E1 = jnp.take_along_axis(level_EC, n_E1, axis=1)
        new_EC = jnp.where(is_slot_EC, jnp.maximum(level_E1 - floor_EC, 0.0), 0.0)
        return (share_EC + _STEP * (new_EC - share_EC), best_EC, best), None

    even_EC = count_E1 / tables.expert_count.astype(jnp.float32)[:, None]
    even_EC = jnp.where(is_slot_EC, even_EC, 0.0)
    carry = vary_alike(even_EC, even_EC, jnp.float32(jnp.inf), tables)[:3]
    # The last trip only looks at what the one before it made.
    return lax.scan(pour, carry, None, length=_NUM_ITERATIONS + 1)[0][1]


def _ordinals(expert_N: jax.Array) -> jax.Array:
    """How many earlier choices are of the same expert."""
    position_N = jnp.arange(len(expert_N), dtype=jnp.int32)
    order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    sorted_N = expert_N[order_N]
    is_first_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
    first_N = lax.cummax(jnp.where(is_first_N, position_N, 0))
    return jnp.zeros_like(position_N).at[order_N].set(position_N - first_N)


def _balance(
    expert_N: jax.Array,
    ordinal_N: jax.Array,
    tables: ExpertTables,
    num_devices: int,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Shares for the counts of all devices, and ordinals among all their choices."""
    count_E = count_experts(expert_N, tables.num_experts)
    if axis_name is not None:
        count_DE = lax.all_gather(count_E, axis_name)
        before_DE = jnp.cumsum(count_DE, axis=0) - count_DE
        ordinal_N = ordinal_N + before_DE[lax.axis_index(axis_name)][expert_N]
        count_E = count_DE.sum(axis=0)
    return balanced_shares(count_E, tables, num_devices), ordinal_N


def _nearest(
    tables: ExpertTables, device: jax.Array, num_devices: int, num_nodes: int
) -> tuple[jax.Array, jax.Array]:
    """The nearest replicas of each expert, first in their row, and their number."""
    slots_EC = tables.logical_to_physical_map
    at_EC = slots_EC // (tables.num_physical_experts // num_devices)
    per_node = num_devices // num_nodes
    is_far_EC = (at_EC // per_node != device // per_node).astype(jnp.int32)
    distance_EC = (at_EC != device).astype(jnp.int32) + is_far_EC
    distance_EC = jnp.where(slots_EC >= 0, distance_EC, 3)
    order_EC = jnp.argsort(distance_EC, axis=1, stable=True)
    nearest_E1 = distance_EC.min(axis=1, keepdims=True)
    count_E = (distance_EC == nearest_E1).sum(axis=1, dtype=jnp.int32)
    return jnp.take_along_axis(slots_EC, order_EC, axis=1), count_E


def _check(
    tables: ExpertTables, choice: ReplicaChoice, num_devices: int, num_nodes: int
) -> None:
    if choice not in get_args(ReplicaChoice):
        raise ValueError(
            f"{choice=} must be one of {', '.join(get_args(ReplicaChoice))}."
        )
    if tables.expert_count.ndim != 1:
        raise ValueError(
            f"tables are of {tables.expert_count.shape[0]} layers; pass one layer's, "
            "tables.layer(i)."
        )
    if num_devices < 1 or tables.num_physical_experts % num_devices:
        raise ValueError(
            f"{num_devices=} must divide the {tables.num_physical_experts} slots of "
            "the tables."
        )
    if num_nodes < 1 or num_devices % num_nodes:
        raise ValueError(f"{num_nodes=} must divide {num_devices=}.")
