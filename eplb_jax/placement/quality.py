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
from eplb_jax.placement.checks import (
    as_placement,
    as_speeds,
    check_sizes,
    count_held,
    is_traced,
)
from eplb_jax.placement.packing import replicate_experts
from eplb_jax.placement.scale import as_loads, check_loads


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
    weight_LE = jnp.asarray(check_loads(weight))
    expert_LS = _match(weight_LE, physical_to_logical_map, num_devices)
    return _device_loads(weight_LE, expert_LS, num_devices)


@jax.jit
def physical_expert_loads(weight_LE: jax.Array, expert_LS: jax.Array) -> jax.Array:
    """Computes the load of each physical expert: replicas share a load evenly.

    Args:
      weight_LE: [layers, experts] float32 loads.
      expert_LS: [layers, physical experts] int32; empty if it is no expert's number.

    Returns:
      [layers, physical experts] float32.

    Examples:
      >>> weight, placement = jnp.array([[6.0, 2.0]]), jnp.array([[0, -1, 0, 1]])
      >>> physical_expert_loads(weight, placement).tolist()
      [[3.0, 0.0, 3.0, 2.0]]
    """
    num_experts = weight_LE.shape[1]
    load_LE = divide(weight_LE, jnp.maximum(_count(expert_LS, num_experts), 1))
    inside_LS = jnp.clip(expert_LS, 0, num_experts - 1)
    load_LS = jnp.take_along_axis(load_LE, inside_LS, axis=1)
    return jnp.where(expert_LS == inside_LS, load_LS, 0.0)


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
      [layers] float32, at most 1; 1 for a layer without any load. Inside jit, where
      values are not checked, 0 if an expert with load has no replica, or one on a dead
      device: that load is never done.

    Raises:
      ValueError: for sizes that do not fit, and outside jit for capacities that are
        negative, not finite or all zero, for experts that do not exist or have no
        replica, and for load on a dead device.

    Examples:
      >>> balancedness([[6, 2, 1]], jnp.array([[0, 1, 0, 2]]), 2).tolist()
      [0.8999999761581421]
    """
    weight_LE = as_loads(weight)
    expert_LS = _match(weight_LE, physical_to_logical_map, num_gpus)
    capacity_D = as_speeds(device_capacity, num_gpus)
    _check_served(weight_LE, expert_LS, capacity_D)
    return score_placement(weight_LE, expert_LS, capacity_D)


@jax.jit
def score_placement(
    weight_LE: jax.Array, expert_LS: jax.Array, capacity_D: jax.Array
) -> jax.Array:
    """Computes `balancedness` as inside jit: nothing is checked.

    Args:
      weight_LE: [layers, experts] float32 loads, from `as_loads`.
      expert_LS: [layers, physical experts] int32, -1 if empty.
      capacity_D: [devices] float32 relative speeds.

    Returns:
      [layers] float32.

    Examples:
      >>> weight, speeds = jnp.array([[6.0, 2.0]]), jnp.array([1.0, 0.0])
      >>> score_placement(weight, jnp.array([[0, 1]]), speeds).tolist()
      [0.0]
    """
    load_LD = _device_loads(weight_LE, expert_LS, len(capacity_D))
    is_alive_1D = capacity_D[None] > 0
    used_LD, mean_L = _uses(load_LD, capacity_D)
    most_L = used_LD.max(axis=1)
    score_L = jnp.where(most_L > 0, mean_L / jnp.where(most_L > 0, most_L, 1.0), 1.0)
    is_held_LE = _count(expert_LS, weight_LE.shape[1]) > 0
    is_served_L = (is_held_LE | (weight_LE <= 0)).all(axis=1)
    is_served_L &= (is_alive_1D | (load_LD <= 0)).all(axis=1)
    # The largest of sums that are all equal may round to less than their mean.
    return jnp.where(is_served_L, jnp.minimum(score_L, 1.0), 0.0)


@jax.jit
def device_uses(
    weight_LE: jax.Array, expert_LS: jax.Array, capacity_D: jax.Array
) -> jax.Array:
    """Computes the load of each device in relation to its fair share.

    Args:
      weight_LE: [layers, experts] float32 loads, from `as_loads`.
      expert_LS: [layers, physical experts] int32, -1 if empty.
      capacity_D: [devices] float32 relative speeds, 0 for a dead device.

    Returns:
      [layers, devices] float32; 0 for a layer without any load.

    Examples:
      >>> weight, speeds = jnp.array([[6.0, 3.0]]), jnp.array([1.0, 2.0])
      >>> device_uses(weight, jnp.array([[0, 1]]), speeds).tolist()
      [[2.0, 0.5]]
    """
    load_LD = _device_loads(weight_LE, expert_LS, len(capacity_D))
    used_LD, mean_L = _uses(load_LD, capacity_D)
    mean_L1 = mean_L[:, None]
    return jnp.where(mean_L1 > 0, used_LD / jnp.where(mean_L1 > 0, mean_L1, 1.0), 0.0)


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
      ValueError: if there are fewer replicas than experts, or the devices do not divide
        them.

    Examples:
      Expert 0 fills a device and a half, and there is one replica to spare:

      >>> balancedness_bound([[6, 1, 1]], 4, 4).tolist()
      [0.6666666865348816]
    """
    weight_LE = as_loads(weight)
    check_sizes(weight_LE.shape[1], num_replicas, 1, 1, num_gpus)
    return _bound(weight_LE, num_replicas, num_gpus)


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
    weight_LE = as_loads(weight)
    expert_LS = _match(weight_LE, physical_to_logical_map, num_nodes)
    load_LS = physical_expert_loads(weight_LE, expert_LS)
    return _remote_share(load_LS, expert_LS, jnp.asarray(home, jnp.int32), num_nodes)


@functools.partial(jax.jit, static_argnums=2)
def _device_loads(
    weight_LE: jax.Array, expert_LS: jax.Array, num_devices: int
) -> jax.Array:
    load_LS = physical_expert_loads(weight_LE, expert_LS)
    return load_LS.reshape(len(expert_LS), num_devices, -1).sum(axis=2)


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


def _uses(load_LD: jax.Array, capacity_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each device's load over its speed, and what all would have if even."""
    capacity_1D = capacity_D[None]
    is_alive_1D = capacity_1D > 0
    used_LD = load_LD / jnp.where(is_alive_1D, capacity_1D, 1.0)
    total = jnp.where(is_alive_1D, capacity_1D, 0.0).sum()
    return used_LD, load_LD.sum(axis=1) / jnp.where(total > 0, total, 1.0)


def _count(expert_LS: jax.Array, num_experts: int) -> jax.Array:
    """Counts the replicas of each expert: [layers, num_experts] int32."""
    return jax.vmap(lambda expert_S: count_replicas(expert_S, num_experts))(expert_LS)


def _match(weight_LE: jax.Array, placement: ArrayLike, num_devices: int) -> jax.Array:
    """Converts a placement to int32, and checks that it is one of these experts."""
    expert_LS = _divide_among(as_placement(placement, weight_LE.shape[1]), num_devices)
    if len(weight_LE) != len(expert_LS):
        raise ValueError(
            f"weight has {len(weight_LE)} layers, but the placement {len(expert_LS)}; "
            "pass those of the same model."
        )
    return expert_LS


def _as_placement(placement: ArrayLike, num_devices: int) -> jax.Array:
    return _divide_among(as_placement(placement), num_devices)


def _divide_among(expert_LS: jax.Array, num_devices: int) -> jax.Array:
    if expert_LS.ndim != 2 or num_devices < 1 or expert_LS.shape[1] % num_devices:
        raise ValueError(
            f"A placement of shape {expert_LS.shape} cannot be divided among "
            f"{num_devices} devices; it must be [layers, physical experts], a multiple "
            "of the number of devices."
        )
    return expert_LS


def _check_served(
    weight_LE: jax.Array, expert_LS: jax.Array, capacity_D: jax.Array
) -> None:
    """Raises if an expert has no replica, or a dead device has load."""
    if is_traced(expert_LS):
        return
    num_experts, placement_LS = weight_LE.shape[1], np.asarray(expert_LS)
    is_short_L = count_held(placement_LS, num_experts) < num_experts
    if is_short_L.any():
        layer = int(np.argmax(is_short_L))
        expert = min(set(range(num_experts)) - set(placement_LS[layer].tolist()))
        raise ValueError(
            f"Expert {expert} of layer {layer} has no replica in "
            "physical_to_logical_map, and every expert needs one."
        )
    if is_traced(weight_LE) or is_traced(capacity_D):
        return
    load_LD = np.asarray(_device_loads(weight_LE, expert_LS, len(capacity_D)))
    is_dead_D = np.asarray(capacity_D) <= 0
    is_wrong_LD = is_dead_D[None] & (load_LD > 0)
    if is_wrong_LD.any():
        layer, device = np.argwhere(is_wrong_LD)[0]
        raise ValueError(
            f"Device {device} has load in layer {layer}, but device_capacity["
            f"{device}]=0; place its experts elsewhere, as refine_placement does."
        )
