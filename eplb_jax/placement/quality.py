"""How good a placement is, how good one can be, and what it costs to get there.

Shape suffixes: L layers, E experts, S slots of a layer, G devices, K slots of a device.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eplb_jax.placement.arrays import divide
from eplb_jax.placement.checks import as_loads
from eplb_jax.placement.packing import replicate_experts
from eplb_jax.placement.search import count_replicas


def device_loads(
    weight: ArrayLike, physical_to_logical_map: ArrayLike, num_gpus: int
) -> jax.Array:
    """The load of each device, replicas of an expert sharing its load evenly.

    Args:
      weight: [layers, experts] loads.
      physical_to_logical_map: [layers, slots] int32, -1 for an empty slot.
      num_gpus: devices; divides the number of slots. With the number of nodes here,
        the loads of nodes.

    Returns:
      [layers, num_gpus] float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> device_loads([[6, 2, 1]], jnp.array([[0, 1, 0, 2]]), 2).tolist()
      [[5.0, 4.0]]
    """
    weight_LE, expert_LS = _as_pair(weight, physical_to_logical_map, num_gpus)
    return _device_loads(weight_LE, expert_LS, num_gpus)


@jax.jit
def physical_expert_loads(weight_LE: jax.Array, expert_LS: jax.Array) -> jax.Array:
    """The load of each slot, replicas of an expert sharing its load evenly.

    Args:
      weight_LE: [layers, experts] float32 loads.
      expert_LS: [layers, slots] int32, -1 for an empty slot.

    Returns:
      [layers, slots] float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> physical_expert_loads(jnp.array([[6.0, 2.0]]), jnp.array([[0, -1, 0, 1]])).tolist()
      [[3.0, 0.0, 3.0, 2.0]]
    """
    num_experts = weight_LE.shape[1]
    count_LE = jax.vmap(lambda expert_S: count_replicas(expert_S, num_experts))(
        expert_LS
    )
    load_LE = divide(weight_LE, jnp.maximum(count_LE, 1))
    load_LS = jnp.take_along_axis(load_LE, jnp.maximum(expert_LS, 0), axis=1)
    return jnp.where(expert_LS >= 0, load_LS, 0.0)


def balancedness(
    weight: ArrayLike,
    physical_to_logical_map: ArrayLike,
    num_gpus: int,
    device_capacity: ArrayLike | None = None,
) -> jax.Array:
    """Mean device load over maximal device load: 1 is perfect.

    A layer's step takes as long as its hottest device, so this is also the part of
    the devices' time that is not spent waiting for it.

    Args:
      weight: [layers, experts] loads.
      physical_to_logical_map: [layers, slots] int32, -1 for an empty slot.
      num_gpus: devices; divides the number of slots. With the number of nodes here,
        the balancedness of nodes.
      device_capacity: [num_gpus] relative speeds; loads count relative to them, and
        dead devices (0) not at all.

    Returns:
      [layers] float32; 1 for a layer without any load.

    Examples:
      >>> import jax.numpy as jnp
      >>> balancedness([[6, 2, 1]], jnp.array([[0, 1, 0, 2]]), 2).tolist()
      [0.8999999761581421]
    """
    load_LG = device_loads(weight, physical_to_logical_map, num_gpus)
    if device_capacity is None:
        device_capacity = np.ones(num_gpus, np.float32)
    return _balancedness(load_LG, jnp.asarray(device_capacity, jnp.float32))


def balancedness_bound(
    weight: ArrayLike, num_replicas: int, num_gpus: int
) -> jax.Array:
    """A balancedness that no placement exceeds, hierarchical or not.

    Some device carries at least the mean load; and however the replicas are shared
    out, some device carries a replica at least as heavy as the heaviest one of the
    greedy replication, which is the least possible (an expert spread over all devices
    still leaves its share on each).

    Args:
      weight: [layers, experts] loads.
      num_replicas: slots of a layer.
      num_gpus: devices; divides the number of slots.

    Returns:
      [layers] float32.

    Raises:
      ValueError: if there are fewer replicas than experts.

    Examples:
      Expert 0 fills a device and a half, and there is one replica to spare:

      >>> balancedness_bound([[6, 1, 1]], 4, 4).tolist()
      [0.6666666865348816]
    """
    return _bound(as_loads(weight), num_replicas, num_gpus)


def count_moves(old: ArrayLike, new: ArrayLike, num_gpus: int) -> jax.Array:
    """How many replicas the devices have to fetch to get from one placement to another.

    Where a replica lies within its device does not matter.

    Args:
      old: [layers, slots] int32 physical_to_logical_map.
      new: [layers, slots] int32 physical_to_logical_map.
      num_gpus: devices; divides the number of slots.

    Returns:
      [layers] int32.

    Examples:
      >>> import jax.numpy as jnp
      >>> old, new = jnp.array([[0, 1, 2, 3]]), jnp.array([[1, 0, 1, 2]])
      >>> count_moves(old, new, 2).tolist()
      [1]
    """
    pair = _as_placement(old, num_gpus), _as_placement(new, num_gpus)
    return _count_moves(*pair, num_gpus)


def count_duplicates(physical_to_logical_map: ArrayLike, num_gpus: int) -> jax.Array:
    """How many slots repeat an expert that their device has already.

    Such a slot is wasted: the device gets no less load, and no other device less.

    Args:
      physical_to_logical_map: [layers, slots] int32, -1 for an empty slot.
      num_gpus: devices; divides the number of slots.

    Returns:
      [layers] int32.

    Examples:
      >>> import jax.numpy as jnp
      >>> count_duplicates(jnp.array([[0, 0, 1, 2]]), 2).tolist()
      [1]
    """
    expert_LS = _as_placement(physical_to_logical_map, num_gpus)
    return _count_duplicates(expert_LS, num_gpus)


def remote_share(
    weight: ArrayLike,
    physical_to_logical_map: ArrayLike,
    home: jax.Array,
    num_nodes: int,
) -> jax.Array:
    """The part of the load that is served away from its expert's home node.

    Args:
      weight: [layers, experts] loads.
      physical_to_logical_map: [layers, slots] int32, -1 for an empty slot.
      home: [layers, experts] int32, see `home_nodes`.
      num_nodes: nodes; divides the number of slots.

    Returns:
      [layers] float32, between 0 and 1; 0 for a layer without any load.

    Examples:
      >>> import jax.numpy as jnp
      >>> home = jnp.array([[0, 1]])
      >>> remote_share([[6, 2]], jnp.array([[0, 0, 0, 1]]), home, 2).tolist()
      [0.25]
    """
    weight_LE, expert_LS = _as_pair(weight, physical_to_logical_map, num_nodes)
    load_LS = physical_expert_loads(weight_LE, expert_LS)
    return _remote_share(load_LS, expert_LS, jnp.asarray(home, jnp.int32), num_nodes)


@functools.partial(jax.jit, static_argnums=2)
def _device_loads(
    weight_LE: jax.Array, expert_LS: jax.Array, num_gpus: int
) -> jax.Array:
    load_LS = physical_expert_loads(weight_LE, expert_LS)
    return load_LS.reshape(len(expert_LS), num_gpus, -1).sum(axis=2)


@jax.jit
def _balancedness(load_LG: jax.Array, capacity_G: jax.Array) -> jax.Array:
    capacity_1G = capacity_G[None]
    used_LG = load_LG / jnp.where(capacity_1G > 0, capacity_1G, 1.0)
    mean_L = load_LG.sum(axis=1) / capacity_1G.sum()
    most_L = used_LG.max(axis=1)
    return jnp.where(most_L > 0, mean_L / jnp.where(most_L > 0, most_L, 1.0), 1.0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bound(weight_LE: jax.Array, num_replicas: int, num_gpus: int) -> jax.Array:
    most_L = jnp.full(len(weight_LE), num_gpus, jnp.int32)
    _, _, count_LE = replicate_experts(weight_LE, num_replicas, [most_L])
    heaviest_L = divide(weight_LE, jnp.minimum(count_LE, num_gpus)).max(axis=1)
    mean_L = weight_LE.sum(axis=1) / num_gpus
    safe_L = jnp.where(mean_L > 0, jnp.maximum(heaviest_L, mean_L), 1.0)
    return jnp.where(mean_L > 0, mean_L / safe_L, 1.0)


@functools.partial(jax.jit, static_argnums=2)
def _count_moves(old_LS: jax.Array, new_LS: jax.Array, num_gpus: int) -> jax.Array:
    old_LGK, new_LGK = (e.reshape(len(e), num_gpus, -1) for e in (old_LS, new_LS))
    # The n-th replica of an expert on a device is new where the device had fewer.
    same_LGKK = new_LGK[..., :, None] == old_LGK[..., None, :]
    had_LGK = same_LGKK.sum(axis=-1, dtype=jnp.int32)
    is_new_LGK = (_rank_on_device(new_LGK) >= had_LGK) & (new_LGK >= 0)
    return is_new_LGK.sum(axis=(1, 2), dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _count_duplicates(expert_LS: jax.Array, num_gpus: int) -> jax.Array:
    expert_LGK = expert_LS.reshape(len(expert_LS), num_gpus, -1)
    is_again_LGK = (_rank_on_device(expert_LGK) > 0) & (expert_LGK >= 0)
    return is_again_LGK.sum(axis=(1, 2), dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=3)
def _remote_share(
    load_LS: jax.Array, expert_LS: jax.Array, home_LE: jax.Array, num_nodes: int
) -> jax.Array:
    num_slots = expert_LS.shape[1]
    node_S = jnp.arange(num_slots, dtype=jnp.int32) // (num_slots // num_nodes)
    home_LS = jnp.take_along_axis(home_LE, jnp.maximum(expert_LS, 0), axis=1)
    total_L = load_LS.sum(axis=1)
    away_L = jnp.where(home_LS != node_S[None], load_LS, 0.0).sum(axis=1)
    return away_L / jnp.where(total_L > 0, total_L, 1.0)


def _rank_on_device(expert_LGK: jax.Array) -> jax.Array:
    """How many slots before this one, on the same device, hold the same expert."""
    same_LGKK = expert_LGK[..., :, None] == expert_LGK[..., None, :]
    earlier_KK = jnp.tri(expert_LGK.shape[-1], k=-1, dtype=jnp.bool_)[None, None]
    return (same_LGKK & earlier_KK).sum(axis=-1, dtype=jnp.int32)


def _as_pair(
    weight: ArrayLike, placement: ArrayLike, num_gpus: int
) -> tuple[jax.Array, jax.Array]:
    weight_LE = as_loads(weight)
    expert_LS = _as_placement(placement, num_gpus)
    if len(weight_LE) != len(expert_LS):
        raise ValueError(
            f"weight has {len(weight_LE)} layers, but the placement {len(expert_LS)}; "
            "they must be of one model."
        )
    return weight_LE, expert_LS


def _as_placement(placement: ArrayLike, num_gpus: int) -> jax.Array:
    expert_LS = jnp.asarray(placement, jnp.int32)
    if expert_LS.ndim != 2 or num_gpus < 1 or expert_LS.shape[1] % num_gpus:
        raise ValueError(
            f"A placement of shape {expert_LS.shape} cannot be divided among "
            f"{num_gpus=}; it must be [layers, slots], slots a multiple of num_gpus."
        )
    return expert_LS
