"""Policies beyond EPLB's: a soft hierarchy, swaps, unequal and dead devices.

EPLB's hierarchical policy never lets an expert leave the node of its group, and
that, not its greedy packing, is what costs it balance. Here every expert keeps a
replica on its home node, further replicas may go to any node, and load served away
from home has a price. Both policies here place the replicas twice, dealt out (no two
replicas of an expert on one device, nodes even where devices are) and packed as EPLB
packs them; they improve both placements with `search` and keep the better result.

Shape suffixes: see `eplb_jax`. A row is a home node of a layer.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eplb_jax.placement.arrays import invert, take_rows
from eplb_jax.placement.greedy import experts_by_node
from eplb_jax.placement.packing import replicate_experts
from eplb_jax.placement.problem import Limits, PlacementProblem, Rules
from eplb_jax.placement.scale import as_loads
from eplb_jax.placement.search import search
from eplb_jax.placement.starts import deal, pack

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
    num_devices: int,
    device_capacity: jax.Array,
    remote_price: jax.Array | float | None,
    max_replicas: jax.Array | int,
) -> jax.Array:
    """Deals replicas out and packs them, and improves on both by moving them.

    Args:
      weight_LE: [layers, experts] float32 loads, from `as_loads`.
      num_replicas: physical experts per layer; a multiple of `num_devices`.
      num_groups: groups of experts; with homes, a multiple of `num_nodes`.
      num_nodes: nodes; divides `num_devices`.
      num_devices: devices.
      device_capacity: [num_devices] float32 relative speeds, 0 for a dead device.
      remote_price: of load away from home; None: experts have no home.
      max_replicas: most replicas of an expert, as far as there are enough experts.

    Returns:
      [layers, num_replicas] int32, the expert of each physical expert; -1 on dead
      devices.
    """
    num_layers, num_experts = weight_LE.shape
    per_device = num_replicas // num_devices
    per_share_D = per_share(device_capacity)
    # Replicas are made where the experts are at home, as many as the node has room
    # for; the search afterwards repairs what the hierarchy cannot balance in this way.
    num_homes = 1 if remote_price is None else num_nodes
    order_LE = experts_by_node(weight_LE, num_groups, num_homes)
    weight_LE = normalise(weight_LE)
    alive_N = (per_share_D > 0).reshape(num_homes, -1).sum(axis=1, dtype=jnp.int32)
    rows = (num_layers * num_homes, num_experts // num_homes)
    alive_A = jnp.broadcast_to(alive_N, (num_layers, num_homes)).reshape(-1)
    # One replica per device of the node, then one per device of the cluster.
    spread = [alive_A, jnp.full_like(alive_A, alive_N.sum())]
    spread = [jnp.minimum(most_A, max_replicas) for most_A in spread]
    replica_AX, rank_AX, _ = replicate_experts(
        take_rows(weight_LE, order_LE).reshape(rows), num_replicas // num_homes, spread
    )
    expert_AX = take_rows(order_LE.reshape(rows), replica_AX)
    position_X = jnp.arange(num_replicas // num_homes, dtype=jnp.int32)
    is_filled_NX = position_X[None] < (alive_N * per_device)[:, None]
    expert_LNX = expert_AX.reshape(num_layers, num_homes, -1)
    expert_LNX = jnp.where(is_filled_NX[None], expert_LNX, -1)
    expert_LS = expert_LNX.reshape(num_layers, num_replicas)
    rank_LS = rank_AX.reshape(num_layers, num_replicas)
    home_LE = jnp.full_like(order_LE, -1)
    if remote_price is not None:
        home_LE = invert(order_LE, _node_of_position(order_LE, num_homes))

    def deal_layer(
        weight_E: jax.Array, expert_S: jax.Array, rank_S: jax.Array, home_E: jax.Array
    ) -> jax.Array:
        return deal(weight_E, expert_S, rank_S, home_E, per_share_D, num_nodes)

    dealt_LS = jax.vmap(deal_layer)(weight_LE, expert_LS, rank_LS, home_LE)
    packed_LS = pack(weight_LE, expert_LS, num_homes, num_devices)
    # Packing does not know about dead devices.
    packed_LS = jnp.where((per_share_D > 0).all(), packed_LS, dealt_LS)
    per_share_LD = jnp.broadcast_to(per_share_D, (num_layers, num_devices))
    problem = PlacementProblem(
        weight=weight_LE,
        per_share=per_share_LD,
        home=home_LE,
        original=dealt_LS,
        max_moves=jnp.full(num_layers, num_replicas, jnp.int32),
        min_gain=jnp.full(num_layers, _MIN_GAIN, jnp.float32),
    )
    rules = Rules(num_nodes=num_nodes, has_homes=remote_price is not None)
    limits = Limits(
        max_steps=jnp.int32(num_replicas),
        max_replicas=jnp.asarray(max_replicas, jnp.int32),
        remote_price=jnp.float32(0 if remote_price is None else remote_price),
    )
    # Both starts are layers of one search: the second compiles nothing more.
    start = jnp.concatenate([dealt_LS, packed_LS])
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), problem)
    _, end, cost = search(twice, start, rules, limits)
    is_packed_L1 = (cost[num_layers:] < cost[:num_layers])[:, None]
    return jnp.where(is_packed_L1, end[num_layers:], end[:num_layers])


def home_nodes(weight: ArrayLike, num_groups: int, num_nodes: int) -> jax.Array:
    """Returns the node that EPLB's hierarchical policy keeps each expert on.

    Args:
      weight: [layers, experts] loads.
      num_groups: groups of experts; a multiple of `num_nodes`.
      num_nodes: nodes.

    Returns:
      [layers, experts] int32.

    Examples:
      >>> home_nodes(jnp.array([[1.0, 2, 9, 9, 3, 3, 0, 0]]), 4, 2).tolist()
      [[1, 1, 0, 0, 1, 1, 0, 0]]
    """
    return _home_nodes(as_loads(weight), num_groups, num_nodes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _home_nodes(weight_LE: jax.Array, num_groups: int, num_nodes: int) -> jax.Array:
    order_LE = experts_by_node(weight_LE, num_groups, num_nodes)
    return invert(order_LE, _node_of_position(order_LE, num_nodes))


@jax.jit
def normalise(weight_LE: jax.Array) -> jax.Array:
    """Scales each layer's loads to sum 1, none of them zero.

    Args:
      weight_LE: [layers, experts] float32, from `as_loads`.

    Returns:
      [layers, experts] float32.

    Examples:
      >>> normalise(jnp.array([[0.0, 0.0], [1.0, 3.0]])).tolist()
      [[0.5, 0.5], [0.25..., 0.74...]]
    """
    mean_L1 = weight_LE.mean(axis=1, keepdims=True)
    weight_LE = jnp.where(mean_L1 > 0, weight_LE + _FLOOR * mean_L1, 1.0)
    return weight_LE / weight_LE.sum(axis=1, keepdims=True)


@jax.jit
def per_share(device_capacity: jax.Array) -> jax.Array:
    """Returns 1 / each device's share of the capacity.

    This factor turns a device's part of the load into its use, 1 being its fair share.

    Args:
      device_capacity: [devices] float32.

    Returns:
      [devices] float32; 0 for a dead device.

    Examples:
      >>> per_share(jnp.array([1.0, 3.0, 0.0])).tolist()
      [4.0, 1.3333333730697632, 0.0]
    """
    is_alive = device_capacity > 0
    safe = jnp.where(is_alive, device_capacity, 1.0)
    return jnp.where(is_alive, device_capacity.sum() / safe, 0.0)


def _node_of_position(order_LE: jax.Array, num_nodes: int) -> jax.Array:
    position_E = jnp.arange(order_LE.shape[1], dtype=jnp.int32)
    node_E = position_E // (order_LE.shape[1] // num_nodes)
    return jnp.broadcast_to(node_E, order_LE.shape)
