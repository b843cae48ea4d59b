"""Checks of the arguments, and their error messages.

Shapes and sizes are static and always checked. Values are checked outside jit; inside
jit only if `check_values=True`, through `jax.experimental.checkify`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

_LOADS = "weight must be finite and not negative"


def as_loads(weight: Any, check_values: bool = False) -> jax.Array:
    """Converts loads to float32 [layers, experts] and checks what can be checked.

    Args:
      weight: [layers, experts] loads, such as token counts.
      check_values: also check traced values, with checkify.

    Returns:
      [layers, experts] float32.

    Raises:
      ValueError: for a wrong rank, and outside jit for a NaN, an infinity or a
        negative load.

    Examples:
      >>> as_loads([[1, -2]])
      Traceback (most recent call last):
        ...
      ValueError: weight must be finite and not negative, but weight[0, 1] is -2.0; ...
    """
    if not isinstance(weight, jax.Array):
        weight = np.asarray(weight)
    if weight.ndim != 2:
        raise ValueError(
            f"weight has shape {weight.shape}, but it must be [layers, experts]; use "
            "weight[None] for one layer, or sum windows over their axis first."
        )
    if is_traced(weight):
        if check_values:
            is_good = jnp.all(jnp.isfinite(weight) & (weight >= 0))
            checkify.check(is_good, f"{_LOADS}; check the counts that made it.")
        return weight.astype(jnp.float32)
    with np.errstate(over="ignore"):
        values = np.asarray(weight).astype(np.float32)
    is_bad = ~(np.isfinite(values) & (values >= 0))
    if is_bad.any():
        layer, expert = np.argwhere(is_bad)[0]
        raise ValueError(
            f"{_LOADS}, but weight[{layer}, {expert}] is {values[layer, expert]}; "
            "check the counts that made it."
        )
    return jnp.asarray(weight if isinstance(weight, jax.Array) else values, jnp.float32)


def as_capacity(
    device_capacity: Any,
    num_devices: int,
    num_physical_experts: int,
    num_experts: int,
    check_values: bool,
) -> jax.Array:
    """Converts capacities to float32 [num_devices] and checks what can be checked.

    Args:
      device_capacity: [num_devices] relative speeds, 0 for a dead device; None: all 1.
      num_devices: devices.
      num_physical_experts: physical experts of all devices.
      num_experts: logical experts; the devices alive must have room for all.
      check_values: also check traced values, with checkify.

    Returns:
      [num_devices] float32.

    Raises:
      ValueError: for a wrong shape, and outside jit for bad values or too few devices
        alive.

    Examples:
      >>> as_capacity([1, 0], 2, 8, 6, False)
      Traceback (most recent call last):
        ...
      ValueError: device_capacity leaves 1 of 2 devices alive, with 4 physical ...
    """
    if device_capacity is None:
        return jnp.asarray(np.ones(num_devices, np.float32))
    if not isinstance(device_capacity, jax.Array):
        device_capacity = np.asarray(device_capacity, np.float32)
    if device_capacity.shape != (num_devices,):
        raise ValueError(
            f"device_capacity has shape {device_capacity.shape}, but there are "
            f"{num_devices} devices; give one speed per device."
        )
    per_device = num_physical_experts // num_devices
    if is_traced(device_capacity):
        if check_values:
            alive = (device_capacity > 0).sum() * per_device
            is_good = jnp.all(jnp.isfinite(device_capacity) & (device_capacity >= 0))
            checkify.check(
                is_good & (alive >= num_experts),
                "device_capacity must be finite, not negative, and leave a physical "
                f"expert for each of {num_experts} experts.",
            )
        return device_capacity.astype(jnp.float32)
    values = np.asarray(device_capacity)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"device_capacity must be finite and not negative, but it is {values}; "
            "use 0 for a dead device."
        )
    alive = int((values > 0).sum())
    if alive * per_device < num_experts:
        raise ValueError(
            f"device_capacity leaves {alive} of {num_devices} devices alive, with "
            f"{alive * per_device} physical experts for {num_experts} experts, and "
            "every expert needs one; use more replicas or fewer dead devices."
        )
    return jnp.asarray(values, jnp.float32)


def check_sizes(
    num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    """Raises ValueError unless the sizes fit each other.

    Args:
      num_experts: logical experts.
      num_replicas: physical experts per layer.
      num_groups: groups of experts.
      num_nodes: nodes.
      num_gpus: devices.

    Raises:
      ValueError: if one does not fit, with the reason.

    Examples:
      >>> check_sizes(12, 15, 4, 2, 5)
      Traceback (most recent call last):
        ...
      ValueError: num_gpus=5 must be a multiple of num_nodes=2; ...
    """
    sizes = {
        "num_replicas": num_replicas,
        "num_groups": num_groups,
        "num_nodes": num_nodes,
        "num_gpus": num_gpus,
    }
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(
                f"{name}={size!r} must be a positive int; under jit, make it static."
            )
    if num_replicas < num_experts:
        raise ValueError(
            f"{num_replicas=} is less than the number of experts {num_experts}, and "
            "every expert needs a replica; use more replicas."
        )
    if num_replicas % num_gpus:
        raise ValueError(
            f"{num_replicas=} must be a multiple of {num_gpus=}, since all GPUs hold "
            "equally many; use "
            f"num_replicas={num_replicas - num_replicas % num_gpus + num_gpus}."
        )
    if num_gpus % num_nodes:
        raise ValueError(
            f"{num_gpus=} must be a multiple of {num_nodes=}; all nodes have equally "
            "many GPUs."
        )
    if num_experts % num_groups:
        raise ValueError(
            f"{num_groups=} must divide the number of experts {num_experts}; use "
            "num_groups=1 if the router has no groups."
        )


def is_traced(value: Any) -> bool:
    """Tells whether a value is not known yet, because jax is tracing.

    Args:
      value: any array.

    Returns:
      True inside jit, vmap and the like.

    Examples:
      >>> is_traced(jnp.ones(2)), bool(jax.jit(lambda x: is_traced(x))(1.0))
      (False, True)
    """
    return isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
