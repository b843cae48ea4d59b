"""Checks of the arguments, and their error messages.

Shapes and sizes are static and always checked. Values are checked outside jit; inside
jit only if `check_values=True`, through `jax.experimental.checkify`.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify


def as_placement(
    placement: Any, num_experts: int | None = None, of: str = "weight has"
) -> jax.Array:
    """Converts a placement to int32 and checks what can be checked.

    Args:
      placement: [layers, physical experts] or [physical experts], -1 if empty.
      num_experts: logical experts; None if unknown.
      of: begins the message's statement of their number.

    Returns:
      The same as int32.

    Raises:
      ValueError: for numbers that are no integers, and outside jit for those of no
        expert.

    Examples:
      >>> as_placement([[0, 2.5]])
      Traceback (most recent call last):
        ...
      ValueError: physical_to_logical_map is float64[1, 2], but experts are ...
    """
    if not isinstance(placement, jax.Array):
        placement = np.asarray(placement)
    if not jnp.issubdtype(placement.dtype, jnp.integer):
        raise ValueError(
            f"physical_to_logical_map is {placement.dtype}{list(placement.shape)}, but "
            "experts are integers; convert it with astype(int)."
        )
    if not is_traced(placement) and placement.size:
        values = np.asarray(placement)
        low, high = int(values.min()), int(values.max())
        if low < -1 or (num_experts is not None and high >= num_experts):
            raise ValueError(
                f"physical_to_logical_map holds {low if low < -1 else high}, but "
                f"{of} {num_experts} experts, and -1 is an empty physical expert; "
                "pass the placement of the same model."
            )
    return jnp.asarray(placement, jnp.int32)


def count_held(placement: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts the experts that have a replica.

    Args:
      placement: [layers, physical experts], -1 if empty.
      num_experts: logical experts.

    Returns:
      [layers].

    Examples:
      >>> count_held(np.array([[0, 2, 2, -1]]), 3).tolist()
      [2]
    """
    is_held_LE = np.zeros((len(placement), num_experts + 1), bool)
    np.put_along_axis(is_held_LE, placement, True, axis=1)  # -1 is the column beyond
    return is_held_LE[:, :num_experts].sum(axis=1)


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
    speeds = as_speeds(device_capacity, num_devices)
    per_device = num_physical_experts // num_devices
    if is_traced(speeds):
        if check_values:
            alive = (speeds > 0).sum() * per_device
            is_good = jnp.all(jnp.isfinite(speeds) & (speeds >= 0))
            checkify.check(
                is_good & (alive >= num_experts),
                "device_capacity must be finite, not negative, and leave a physical "
                f"expert for each of {num_experts} experts.",
            )
        return speeds
    alive = int((np.asarray(speeds) > 0).sum())
    if alive * per_device < num_experts:
        raise ValueError(
            f"device_capacity leaves {alive} of {num_devices} devices alive, with "
            f"{alive * per_device} physical experts for {num_experts} experts, and "
            "every expert needs one; use more replicas or fewer dead devices."
        )
    return speeds


def as_speeds(device_capacity: Any, num_devices: int) -> jax.Array:
    """Converts relative speeds to float32 and checks what can be checked.

    Args:
      device_capacity: [num_devices] relative speeds, 0 for a dead device; None: all 1.
      num_devices: devices.

    Returns:
      [num_devices] float32.

    Raises:
      ValueError: for a wrong shape, and outside jit for bad values and if all are zero.

    Examples:
      >>> as_speeds([1, -1], 2)
      Traceback (most recent call last):
        ...
      ValueError: device_capacity must be finite and not negative, but it is [ 1. ...
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
    if is_traced(device_capacity):
        return device_capacity.astype(jnp.float32)
    values = np.asarray(device_capacity)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"device_capacity must be finite and not negative, but it is {values}; "
            "use 0 for a dead device."
        )
    if not values.any():
        raise ValueError(
            f"device_capacity leaves 0 of {num_devices} devices alive; give those that "
            "serve their speeds, such as 1 to each."
        )
    return jnp.asarray(values, jnp.float32)


def check_counts(**counts: Any) -> None:
    """Raises ValueError unless all are positive ints.

    Args:
      **counts: by their names.

    Raises:
      ValueError: naming the first that is not.

    Examples:
      >>> check_counts(num_gpus=8, every=2.5)
      Traceback (most recent call last):
        ...
      ValueError: every=2.5 must be a positive int below 2**31; under jit, ...
    """
    for name, count in counts.items():
        if not is_count(count):
            raise ValueError(
                f"{name}={count!r} must be a positive int below 2**31; under jit, make "
                "it static."
            )


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
    check_counts(
        num_replicas=num_replicas,
        num_groups=num_groups,
        num_nodes=num_nodes,
        num_gpus=num_gpus,
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


def is_count(value: Any) -> bool:
    """Tells whether a value is a positive int that an int32 can hold.

    Args:
      value: anything.

    Returns:
      False for floats and bools, too.

    Examples:
      >>> is_count(8), is_count(0), is_count(2.5)
      (True, False, False)
    """
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_int and bool(1 <= value < 2**31)


def is_fraction(value: Any) -> bool:
    """Tells whether a value is a number from 0 to 1.

    Args:
      value: anything.

    Returns:
      False for bools, too.

    Examples:
      >>> is_fraction(0.5), is_fraction(1), is_fraction(2), is_fraction("0.5")
      (True, True, False, False)
    """
    is_real = isinstance(value, int | float | np.integer | np.floating)
    return is_real and not isinstance(value, bool) and bool(0 <= value <= 1)


def check_choices(**choices: tuple[Any, Any]) -> None:
    """Raises ValueError unless each value is one of those of its `Literal`.

    Args:
      **choices: (value, the `Literal`) by their names.

    Raises:
      ValueError: naming the first that is not.

    Examples:
      >>> from typing import Literal
      >>> check_choices(route=("near", Literal["direct", "by_node"]))
      Traceback (most recent call last):
        ...
      ValueError: route='near' must be one of direct, by_node.
    """
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            known = ", ".join(get_args(kind))
            raise ValueError(f"{name}={value!r} must be one of {known}.")


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
