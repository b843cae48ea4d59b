"""A better placement, a few moves away from the present one.

A fresh plan moves nearly all replicas, even if the loads have hardly changed. A move
costs a copy of an expert's weights over the network, and after the first few moves
each further one gains little. So at most `max_moves` physical experts per layer move,
the most useful first.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eplb_jax.placement.checks import as_capacity, as_loads, is_traced
from eplb_jax.placement.problem import Limits, PlacementProblem, Rules
from eplb_jax.placement.search import search
from eplb_jax.placement.soft import normalise, per_share


def refine_placement(
    weight: ArrayLike,
    physical_to_logical_map: ArrayLike,
    num_gpus: int,
    *,
    max_moves: int | jax.Array,
    min_gain: float | jax.Array = 1e-6,
    device_capacity: ArrayLike | None = None,
    home: jax.Array | None = None,
    num_nodes: int = 1,
    remote_price: float | jax.Array = 0.02,
    separate: bool = True,
    check_values: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Improves a placement by moving at most `max_moves` physical experts per layer.

    Swaps replicas between devices, and overwrites replicas that are little needed with
    experts that need one more, hottest device first. Experts that a dead device has
    lost are placed elsewhere before anything else moves; then replicas of one expert
    on one device are separated. A layer stops when no move gains `min_gain`, so a
    steady load causes no moves.

    Args:
      weight: [layers, experts] loads to place for.
      physical_to_logical_map: [layers, physical experts] int32, the present placement;
        -1 if empty.
      num_gpus: devices; divides the number of physical experts.
      max_moves: physical experts moved per layer, at most: those that hold another
        expert afterwards. This and `min_gain` may be traced: other values do not
        recompile.
      min_gain: relative fall of the (smoothed) peak device load that each moved
        physical expert must bring. 1e-6 stops at rounding and at gains too small to
        notice; 1e-4 spends moves only on visible imbalance.
      device_capacity: [num_gpus] relative speeds; 0 for a dead device, whose physical
        experts become -1 and count as no moves.
      home: [layers, experts] int32, home node of each expert (see `home_nodes`); its
        last replica there stays, and load served elsewhere costs `remote_price`.
      num_nodes: nodes that the devices are divided into; for `home`.
      remote_price: log of the peak load that serving all load away from home is worth.
      separate: whether to separate replicas of one expert on one device even if that
        does not lower the peak.
      check_values: inside jit, check the loads with checkify.

    Returns:
      physical_to_logical_map: [layers, physical experts] int32.
      num_moves: [layers] int32, physical experts whose weights have to be fetched.

    Raises:
      ValueError: for loads, capacities or sizes that do not fit.

    Examples:
      Swapping experts 0 and 2 takes two moves:

      >>> old = jnp.array([[0, 1, 2, 3]])
      >>> new, moves = refine_placement([[6, 5, 2, 1]], old, 2, max_moves=2)
      >>> new.tolist(), moves.tolist()
      ([[2, 1, 0, 3]], [2])
    """
    weight = as_loads(weight, check_values)
    old = jnp.asarray(physical_to_logical_map, jnp.int32)
    _check_refine(weight, old, num_gpus, max_moves, num_nodes)
    capacity = as_capacity(
        device_capacity, num_gpus, old.shape[1], weight.shape[1], check_values
    )
    if home is not None:
        home = jnp.asarray(home, jnp.int32)
    rules = Rules(
        num_nodes=num_nodes,
        has_homes=home is not None,
        has_budget=True,
        separate=separate,
    )
    limits = Limits(
        max_steps=2 * jnp.asarray(max_moves, jnp.int32) + 1,
        max_moves=jnp.asarray(max_moves, jnp.int32),
        min_gain=jnp.asarray(min_gain, jnp.float32),
        remote_price=jnp.asarray(remote_price, jnp.float32),
    )
    return _refine(weight, old, capacity, home, limits, rules)


@functools.partial(jax.jit, static_argnums=5)
def _refine(
    weight_LE: jax.Array,
    old_LS: jax.Array,
    capacity_D: jax.Array,
    home_LE: jax.Array | None,
    limits: Limits,
    rules: Rules,
) -> tuple[jax.Array, jax.Array]:
    home = jnp.int32(-1) if home_LE is None else home_LE
    home_LE = jnp.broadcast_to(home, weight_LE.shape)
    per_share_D = per_share(capacity_D)
    per_device = old_LS.shape[1] // capacity_D.shape[0]
    is_alive_S = jnp.repeat(per_share_D > 0, per_device)
    kept_LS = jnp.where(is_alive_S[None], old_LS, -1)
    per_share_LD = jnp.broadcast_to(per_share_D, (len(old_LS), len(per_share_D)))
    problem = PlacementProblem(normalise(weight_LE), per_share_LD, home_LE, kept_LS)
    new_LS, _ = search(problem, kept_LS, rules, limits)
    return new_LS, (new_LS != kept_LS).sum(axis=1, dtype=jnp.int32)


def _check_refine(
    weight: jax.Array,
    old: jax.Array,
    num_gpus: int,
    max_moves: int | jax.Array,
    num_nodes: int,
) -> None:
    if old.ndim != 2 or old.shape[0] != weight.shape[0]:
        raise ValueError(
            f"physical_to_logical_map has shape {old.shape}, but weight has "
            f"{weight.shape[0]} layers; it must be [layers, physical experts]."
        )
    if num_gpus < 1 or old.shape[1] % num_gpus:
        raise ValueError(
            f"{num_gpus=} must divide the {old.shape[1]} physical experts of "
            "physical_to_logical_map."
        )
    if num_nodes < 1 or num_gpus % num_nodes:
        raise ValueError(f"{num_gpus=} must be a multiple of {num_nodes=}.")
    if not is_traced(max_moves) and max_moves < 0:
        raise ValueError(f"{max_moves=} must not be negative; use 0 to move nothing.")
    if not is_traced(old):
        values = np.asarray(old)
        low, high = (values.min(), values.max()) if values.size else (0, 0)
        if low < -1 or high >= weight.shape[1]:
            raise ValueError(
                f"physical_to_logical_map holds {low if low < -1 else high}, but "
                f"weight has {weight.shape[1]} experts; pass the placement and the "
                "loads of the same model."
            )
