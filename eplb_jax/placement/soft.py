"""Policies beyond EPLB's: a soft hierarchy, swaps, unequal and dead devices.

EPLB's hierarchical policy never lets an expert leave the node of its group, and
that, not its greedy packing, is what it loses. Here every expert keeps a replica on
its home node, further replicas may go to any node, and load served away from home has
a price. Both policies here place the replicas twice, dealt out (no two of an expert
to one device, nodes even where devices are) and packed as EPLB packs them, move them
from either start with `search`, and keep the better end.

Shape suffixes: L layers, E experts, S slots of a layer, G devices, K slots of a
device, N nodes; one layer unless an L stands there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from eplb_jax.placement.arrays import invert, take_rows
from eplb_jax.placement.greedy import experts_by_node
from eplb_jax.placement.moves import Limits, PlacementProblem, Rules
from eplb_jax.placement.packing import pack_in_order, replicate_experts
from eplb_jax.placement.search import count_replicas, search

# Loadless experts weigh this much of a mean expert, so that they are spread evenly.
_FLOOR = 1e-6
# Swaps stop where float32 cannot tell a gain from rounding.
_MIN_GAIN = 1e-8


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def soft_placement(
    weight_LE: jax.Array,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    device_capacity: jax.Array,
    remote_price: jax.Array | float | None,
) -> jax.Array:
    """Deals replicas out and packs them, and improves on both by moving them.

    Args:
      weight_LE: [layers, experts] float32 loads.
      num_replicas: slots of a layer; a multiple of `num_gpus`.
      num_groups: groups of experts; with homes, a multiple of `num_nodes`.
      num_nodes: nodes; divides `num_gpus`.
      num_gpus: devices.
      device_capacity: [num_gpus] float32 relative speeds, 0 for a dead device.
      remote_price: of load away from home; None: experts have no home.

    Returns:
      [layers, num_replicas] int32, the expert in each slot; -1 on dead devices.
    """
    num_layers, num_experts = weight_LE.shape
    per_gpu = num_replicas // num_gpus
    per_share_G = per_share(device_capacity)
    # Replicas are made where the experts live, as many as the node has slots; what
    # the hierarchy cannot balance in this way, the search mends afterwards.
    num_homes = 1 if remote_price is None else num_nodes
    order_LE = experts_by_node(weight_LE, num_groups, num_homes)
    weight_LE = normalise(weight_LE)
    alive_N = (per_share_G > 0).reshape(num_homes, -1).sum(axis=1, dtype=jnp.int32)
    rows = (num_layers * num_homes, num_experts // num_homes)
    alive_R = jnp.broadcast_to(alive_N, (num_layers, num_homes)).reshape(-1)
    # One replica a device of the node, then one a device of the cluster.
    spread = [alive_R, jnp.full_like(alive_R, alive_N.sum())]
    replica_RS, rank_RS, _ = replicate_experts(
        take_rows(weight_LE, order_LE).reshape(rows), num_replicas // num_homes, spread
    )
    expert_RS = take_rows(order_LE.reshape(rows), replica_RS)
    slot_S = jnp.arange(num_replicas // num_homes, dtype=jnp.int32)
    is_filled_NS = slot_S[None] < (alive_N * per_gpu)[:, None]
    expert_LNS = expert_RS.reshape(num_layers, num_homes, -1)
    expert_LNS = jnp.where(is_filled_NS[None], expert_LNS, -1)
    expert_LS = expert_LNS.reshape(num_layers, num_replicas)
    rank_LS = rank_RS.reshape(num_layers, num_replicas)
    home_LE = jnp.full_like(order_LE, -1)
    if remote_price is not None:
        home_LE = invert(order_LE, _node_of_place(order_LE, num_homes))

    def deal(
        weight_E: jax.Array, expert_S: jax.Array, rank_S: jax.Array, home_E: jax.Array
    ) -> jax.Array:
        return _deal(weight_E, expert_S, rank_S, home_E, per_share_G, num_nodes)

    dealt_LS = jax.vmap(deal)(weight_LE, expert_LS, rank_LS, home_LE)
    packed_LS = _pack(weight_LE, expert_LS, num_homes, num_gpus)
    # Packing knows no dead devices.
    packed_LS = jnp.where((per_share_G > 0).all(), packed_LS, dealt_LS)
    per_share_LG = jnp.broadcast_to(per_share_G, (num_layers, num_gpus))
    problem = PlacementProblem(weight_LE, per_share_LG, home_LE, dealt_LS)
    rules = Rules(num_nodes=num_nodes, has_homes=remote_price is not None)
    limits = Limits(
        max_steps=jnp.int32(num_replicas),
        max_moves=jnp.int32(num_replicas),
        min_gain=jnp.float32(_MIN_GAIN),
        remote_price=jnp.float32(0 if remote_price is None else remote_price),
    )
    # Both starts are layers of one search: the second compiles nothing more.
    start = jnp.concatenate([dealt_LS, packed_LS])
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), problem)
    end, cost = search(twice, start, rules, limits)
    is_packed_L1 = (cost[num_layers:] < cost[:num_layers])[:, None]
    return jnp.where(is_packed_L1, end[num_layers:], end[:num_layers])


@functools.partial(jax.jit, static_argnums=(1, 2))
def home_nodes(weight: ArrayLike, num_groups: int, num_nodes: int) -> jax.Array:
    """The node that EPLB's hierarchical policy keeps each expert on.

    Args:
      weight: [layers, experts] float32 loads.
      num_groups: groups of experts; a multiple of `num_nodes`.
      num_nodes: nodes.

    Returns:
      [layers, experts] int32.

    Examples:
      >>> import jax.numpy as jnp
      >>> home_nodes(jnp.array([[1.0, 2, 9, 9, 3, 3, 0, 0]]), 4, 2).tolist()
      [[1, 1, 0, 0, 1, 1, 0, 0]]
    """
    order_LE = experts_by_node(jnp.asarray(weight), num_groups, num_nodes)
    return invert(order_LE, _node_of_place(order_LE, num_nodes))


@jax.jit
def normalise(weight_LE: jax.Array) -> jax.Array:
    """Loads of sum 1 in each layer, none of them zero; what is no load counts as none.

    Args:
      weight_LE: [layers, experts] float32.

    Returns:
      [layers, experts] float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> normalise(jnp.array([[0.0, 0.0], [1.0, 3.0]])).tolist()
      [[0.5, 0.5], [0.25..., 0.74...]]
    """
    is_load_LE = jnp.isfinite(weight_LE) & (weight_LE > 0)
    weight_LE = jnp.where(is_load_LE, weight_LE, 0.0)
    mean_L1 = weight_LE.mean(axis=1, keepdims=True)
    weight_LE = jnp.where(mean_L1 > 0, weight_LE + _FLOOR * mean_L1, 1.0)
    return weight_LE / weight_LE.sum(axis=1, keepdims=True)


@jax.jit
def per_share(device_capacity: jax.Array) -> jax.Array:
    """What turns a device's part of the load into its use, 1 being its fair share.

    Args:
      device_capacity: [num_gpus] float32.

    Returns:
      [num_gpus] float32; 0 for a dead device.

    Examples:
      >>> import jax.numpy as jnp
      >>> per_share(jnp.array([1.0, 3.0, 0.0])).tolist()
      [4.0, 1.3333333730697632, 0.0]
    """
    is_alive = device_capacity > 0
    safe = jnp.where(is_alive, device_capacity, 1.0)
    return jnp.where(is_alive, device_capacity.sum() / safe, 0.0)


class _Dealt(NamedTuple):
    expert_GK: jax.Array
    filled_G: jax.Array
    load_G: jax.Array
    node_load_N: jax.Array


def _node_of_place(order_LE: jax.Array, num_nodes: int) -> jax.Array:
    place_E = jnp.arange(order_LE.shape[1], dtype=jnp.int32)
    node_E = place_E // (order_LE.shape[1] // num_nodes)
    return jnp.broadcast_to(node_E, order_LE.shape)


def _pack(
    weight_LE: jax.Array, expert_LS: jax.Array, num_homes: int, num_gpus: int
) -> jax.Array:
    """Replicas packed to the devices of their home node, as upstream does."""
    num_experts = weight_LE.shape[1]
    count_LE = jax.vmap(lambda e_S: count_replicas(e_S, num_experts))(expert_LS)
    load_LE = weight_LE / jnp.maximum(count_LE, 1).astype(jnp.float32)
    load_LS = take_rows(load_LE, jnp.maximum(expert_LS, 0))
    rows = (len(expert_LS) * num_homes, -1)
    order_RS, slot_RS = pack_in_order(load_LS.reshape(rows), num_gpus // num_homes)
    sorted_RS = take_rows(expert_LS.reshape(rows), order_RS)
    return invert(slot_RS, sorted_RS).reshape(expert_LS.shape)


def _deal(
    weight_E: jax.Array,
    expert_S: jax.Array,
    rank_S: jax.Array,
    home_E: jax.Array,
    per_share_G: jax.Array,
    num_nodes: int,
) -> jax.Array:
    """Heaviest first, to the device that stays the least used, one by one.

    No device gets two replicas of one expert, and replicas stay on their expert's home
    node, as far as there is room; for this, with homes, each expert's first replica
    goes before all others. Of equally used devices the one on the least used node is
    taken, so that nodes stay even where every device has a single slot
    (`deepseek-ai/EPLB#14`).
    """
    num_slots, num_gpus = expert_S.shape[0], per_share_G.shape[0]
    per_gpu, gpus_per_node = num_slots // num_gpus, num_gpus // num_nodes
    count_E = count_replicas(expert_S, weight_E.shape[0])
    load_E = weight_E / jnp.maximum(count_E, 1).astype(jnp.float32)
    load_S = jnp.where(expert_S >= 0, load_E[expert_S], -1.0)
    is_first_S = (rank_S == 0) & (home_E[expert_S] >= 0)
    order_S = jnp.argsort(-load_S - jnp.where(is_first_S, 2.0, 0.0), stable=True)
    share_G = jnp.where(per_share_G > 0, 1.0 / jnp.maximum(per_share_G, 1.0), 0.0)
    share_N = share_G.reshape(num_nodes, -1).sum(axis=1)
    per_share_N = jnp.where(share_N > 0, 1.0 / jnp.maximum(share_N, 1e-9), 0.0)
    node_G = jnp.arange(num_gpus, dtype=jnp.int32) // gpus_per_node

    def place(i: jax.Array, dealt: _Dealt) -> _Dealt:
        slot = order_S[i]
        expert, load, home = expert_S[slot], load_S[slot], home_E[expert_S[slot]]
        has_room_G = (dealt.filled_G < per_gpu) & (per_share_G > 0)
        is_away_G = (home >= 0) & (node_G != home)
        has_twin_G = (dealt.expert_GK == expert).any(axis=1)
        used_G = (dealt.load_G + load) * per_share_G
        used_N = (dealt.node_load_N + load) * per_share_N
        # In this order: room, no twin, home, use; a thousandth of the node's use.
        cost_G = used_G + 1e-3 * used_N[node_G]
        for worse, is_so_G in ((1e6, is_away_G), (2e6, has_twin_G), (4e6, ~has_room_G)):
            cost_G += jnp.where(is_so_G, jnp.float32(worse), 0.0)
        g = jnp.argmin(cost_G)
        is_placed = (expert >= 0) & has_room_G[g]
        k = jnp.minimum(dealt.filled_G[g], per_gpu - 1)
        placed = jnp.where(is_placed, expert, dealt.expert_GK[g, k])
        load = jnp.where(is_placed, load, 0.0)
        return _Dealt(
            dealt.expert_GK.at[g, k].set(placed),
            dealt.filled_G.at[g].add(is_placed.astype(jnp.int32)),
            dealt.load_G.at[g].add(load),
            dealt.node_load_N.at[node_G[g]].add(load),
        )

    dealt = _Dealt(
        expert_GK=jnp.full((num_gpus, per_gpu), -1, jnp.int32),
        filled_G=jnp.zeros(num_gpus, jnp.int32),
        load_G=jnp.zeros(num_gpus, jnp.float32),
        node_load_N=jnp.zeros(num_nodes, jnp.float32),
    )
    dealt = lax.fori_loop(0, num_slots, place, dealt)
    return dealt.expert_GK.reshape(-1)
