"""How good a placement is, how good one can be, and how many moves it takes.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eplb_jax.placement.arrays import count_replicas, divide
from eplb_jax.placement.checks import as_loads
from eplb_jax.placement.packing import replicate_experts


def device_loads(
    weight: ArrayLike, physical_to_logical_map: ArrayLike, num_devices: int
) -> jax.Array:
    """Computes the load of each device; an expert's replicas share its load evenly.

    Args:
      weight: [layers, experts] loads.
      physical_to_logical_map: [layers, physical experts] int32, -1 if empty.
      num_devices: devices; divides the number of physical experts. Pass the number of
        nodes to get the loads of nodes.

    Returns:
      [layers, num_devices] float32.

    Examples:
      >>> device_loads([[6, 2, 1]], jnp.array([[0, 1, 0, 2]]), 2).tolist()
      [[5.0, 4.0]]
    """
    weight_LE, expert_LS = _as_pair(weight, physical_to_logical_map, num_devices)
    return _device_loads(weight_LE, expert_LS, num_devices)


@jax.jit
def physical_expert_loads(weight_LE: jax.Array, expert_LS: jax.Array) -> jax.Array:
    """Computes the load of each physical expert: replicas share a load evenly.

    Args:
      weight_LE: [layers, experts] float32 loads.
      expert_LS: [layers, physical experts] int32, -1 if empty.

    Returns:
      [layers, physical experts] float32.

    Examples:
      >>> weight, placement = jnp.array([[6.0, 2.0]]), jnp.array([[0, -1, 0, 1]])
      >>> physical_expert_loads(weight, placement).tolist()
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
    """Computes mean device load over maximal device load: 1 is perfect.

    A layer takes as long as its hottest device, so this is also the fraction of the
    devices' time that is not spent waiting for that device.

    Args:
      weight: [layers, experts] loads.
      physical_to_logical_map: [layers, physical experts] int32, -1 if empty.
      num_gpus: devices; divides the number of physical experts. Pass the number of
        nodes to get the balancedness of nodes.
      device_capacity: [num_gpus] relative speeds; loads count relative to them, and
        dead devices (0) do not count.

    Returns:
      [layers] float32; 1 for a layer without any load.

    Examples:
      >>> balancedness([[6, 2, 1]], jnp.array([[0, 1, 0, 2]]), 2).tolist()
      [0.8999999761581421]
    """
    load_LD = device_loads(weight, physical_to_logical_map, num_gpus)
    if device_capacity is None:
        device_capacity = np.ones(num_gpus, np.float32)
    return _balancedness(load_LD, jnp.asarray(device_capacity, jnp.float32))


def balancedness_bound(
    weight: ArrayLike, num_replicas: int, num_gpus: int
) -> jax.Array:
    """Computes a balancedness that no placement exceeds, hierarchical or not.

    Some device carries at least the mean load. And whatever the numbers of replicas,
    some device carries one at least as heavy as the heaviest one of the greedy
    replication, which is the least possible (an expert spread over all devices still
    leaves its share on each).

    Args:
      weight: [layers, experts] loads.
      num_replicas: physical experts per layer.
      num_gpus: devices; divides the number of physical experts.

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


def count_moves(old: ArrayLike, new: ArrayLike, num_devices: int) -> jax.Array:
    """Counts the replicas that devices have to fetch to change to another placement.

    The position of a replica within its device does not matter.

    Args:
      old: [layers, physical experts] int32 physical_to_logical_map.
      new: [layers, physical experts] int32 physical_to_logical_map.
      num_devices: devices; divides the number of physical experts.

    Returns:
      [layers] int32.

    Examples:
      >>> old, new = jnp.array([[0, 1, 2, 3]]), jnp.array([[1, 0, 1, 2]])
      >>> count_moves(old, new, 2).tolist()
      [1]
    """
    pair = _as_placement(old, num_devices), _as_placement(new, num_devices)
    return _count_moves(*pair, num_devices)


def count_duplicates(physical_to_logical_map: ArrayLike, num_devices: int) -> jax.Array:
    """Counts the replicas of experts that their device already has.

    Such a replica is wasted: it takes load off no device.

    Args:
      physical_to_logical_map: [layers, physical experts] int32, -1 if empty.
      num_devices: devices; divides the number of physical experts.

    Returns:
      [layers] int32.

    Examples:
      >>> count_duplicates(jnp.array([[0, 0, 1, 2]]), 2).tolist()
      [1]
    """
    expert_LS = _as_placement(physical_to_logical_map, num_devices)
    return _count_duplicates(expert_LS, num_devices)


def remote_share(
    weight: ArrayLike,
    physical_to_logical_map: ArrayLike,
    home: jax.Array,
    num_nodes: int,
) -> jax.Array:
    """Computes the fraction of the load that is served away from its home node.

    Args:
      weight: [layers, experts] loads.
      physical_to_logical_map: [layers, physical experts] int32, -1 if empty.
      home: [layers, experts] int32, see `home_nodes`.
      num_nodes: nodes; divides the number of physical experts.

    Returns:
      [layers] float32, between 0 and 1; 0 for a layer without any load.

    Examples:
      >>> home = jnp.array([[0, 1]])
      >>> remote_share([[6, 2]], jnp.array([[0, 0, 0, 1]]), home, 2).tolist()
      [0.25]
    """
    weight_LE, expert_LS = _as_pair(weight, physical_to_logical_map, num_nodes)
    load_LS = physical_expert_loads(weight_LE, expert_LS)
    return _remote_share(load_LS, expert_LS, jnp.asarray(home, jnp.int32), num_nodes)


@functools.partial(jax.jit, static_argnums=2)
def _device_loads(
    weight_LE: jax.Array, expert_LS: jax.Array, num_devices: int
) -> jax.Array:
    load_LS = physical_expert_loads(weight_LE, expert_LS)
    return load_LS.reshape(len(expert_LS), num_devices, -1).sum(axis=2)


@jax.jit
def _balancedness(load_LD: jax.Array, capacity_D: jax.Array) -> jax.Array:
    capacity_1D = capacity_D[None]
    used_LD = load_LD / jnp.where(capacity_1D > 0, capacity_1D, 1.0)
    mean_L = load_LD.sum(axis=1) / capacity_1D.sum()
    most_L = used_LD.max(axis=1)
    return jnp.where(most_L > 0, mean_L / jnp.where(most_L > 0, most_L, 1.0), 1.0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bound(weight_LE: jax.Array, num_replicas: int, num_devices: int) -> jax.Array:
    most_L = jnp.full(len(weight_LE), num_devices, jnp.int32)
    _, _, count_LE = replicate_experts(weight_LE, num_replicas, [most_L])
    heaviest_L = divide(weight_LE, jnp.minimum(count_LE, num_devices)).max(axis=1)
    mean_L = weight_LE.sum(axis=1) / num_devices
    safe_L = jnp.where(mean_L > 0, jnp.maximum(heaviest_L, mean_L), 1.0)
    return jnp.where(mean_L > 0, mean_L / safe_L, 1.0)


@functools.partial(jax.jit, static_argnums=2)
def _count_moves(old_LS: jax.Array, new_LS: jax.Array, num_devices: int) -> jax.Array:
    old_LDI, new_LDI = (e.reshape(len(e), num_devices, -1) for e in (old_LS, new_LS))
    # The n-th replica of an expert on a device is new where the device had fewer.
    same_LDII = new_LDI[..., :, None] == old_LDI[..., None, :]
    had_LDI = same_LDII.sum(axis=-1, dtype=jnp.int32)
    is_new_LDI = (_rank_on_device(new_LDI) >= had_LDI) & (new_LDI >= 0)
    return is_new_LDI.sum(axis=(1, 2), dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _count_duplicates(expert_LS: jax.Array, num_devices: int) -> jax.Array:
    expert_LDI = expert_LS.reshape(len(expert_LS), num_devices, -1)
    is_again_LDI = (_rank_on_device(expert_LDI) > 0) & (expert_LDI >= 0)
    return is_again_LDI.sum(axis=(1, 2), dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=3)
def _remote_share(
    load_LS: jax.Array, expert_LS: jax.Array, home_LE: jax.Array, num_nodes: int
) -> jax.Array:
    physical_S = jnp.arange(expert_LS.shape[1], dtype=jnp.int32)
    node_S = physical_S // (expert_LS.shape[1] // num_nodes)
    home_LS = jnp.take_along_axis(home_LE, jnp.maximum(expert_LS, 0), axis=1)
    total_L = load_LS.sum(axis=1)
    away_L = jnp.where(home_LS != node_S[None], load_LS, 0.0).sum(axis=1)
    return away_L / jnp.where(total_L > 0, total_L, 1.0)


def _rank_on_device(expert_LDI: jax.Array) -> jax.Array:
    """Counts the earlier replicas of the same expert on the same device."""
    same_LDII = expert_LDI[..., :, None] == expert_LDI[..., None, :]
    earlier_II = jnp.tri(expert_LDI.shape[-1], k=-1, dtype=jnp.bool_)[None, None]
    return (same_LDII & earlier_II).sum(axis=-1, dtype=jnp.int32)


def _as_pair(
    weight: ArrayLike, placement: ArrayLike, num_devices: int
) -> tuple[jax.Array, jax.Array]:
    weight_LE = as_loads(weight)
    expert_LS = _as_placement(placement, num_devices)
    if len(weight_LE) != len(expert_LS):
        raise ValueError(
            f"weight has {len(weight_LE)} layers, but the placement {len(expert_LS)}; "
            "pass those of the same model."
        )
    return weight_LE, expert_LS


def _as_placement(placement: ArrayLike, num_devices: int) -> jax.Array:
    expert_LS = jnp.asarray(placement, jnp.int32)
    if expert_LS.ndim != 2 or num_devices < 1 or expert_LS.shape[1] % num_devices:
        raise ValueError(
            f"A placement of shape {expert_LS.shape} cannot be divided among "
            f"{num_devices} devices; it must be [layers, physical experts], a multiple "
            "of the number of devices."
        )
    return expert_LS
