"""A better placement, a few moves away from the present one.

A fresh plan moves nearly all replicas, even if the loads have hardly changed. A move
costs a copy of an expert's weights over the network, and after the first few moves
each further one gains little. So at most `max_moves` physical experts per layer move,
the most useful first.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eplb_jax.placement.arrays import count_replicas
from eplb_jax.placement.checks import (
    as_capacity,
    as_placement,
    count_held,
    is_count,
    is_traced,
)
from eplb_jax.placement.problem import Limits, PlacementProblem, Rules
from eplb_jax.placement.scale import as_loads
from eplb_jax.placement.search import search
from eplb_jax.placement.soft import normalise, per_share

# Replicas of an expert.
_NO_LIMIT = int(np.iinfo(np.int32).max)


class _Limits(NamedTuple):
    """Arguments of `refine_placement` under their names; they may be traced."""

    max_moves: int | jax.Array
    min_gain: float | jax.Array
    max_replicas: int = _NO_LIMIT
    remote_price: float | jax.Array = 0.0


def refine_placement(
    weight: ArrayLike,
    physical_to_logical_map: ArrayLike,
    num_gpus: int,
    *,
    max_moves: int | jax.Array,
    min_gain: float | jax.Array = 1e-6,
    max_replicas: int | None = None,
    device_capacity: ArrayLike | None = None,
    home: jax.Array | None = None,
    num_nodes: int = 1,
    remote_price: float | jax.Array = 0.02,
    separate: bool = True,
    check_values: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Improves a placement by moving at most `max_moves` physical experts per layer.

    Swaps replicas between devices, and overwrites replicas that are little needed with
    experts that need one more, hottest device first. Before that, experts that a dead
    device has lost are placed elsewhere, replicas of one expert on one device are
    separated, and empty physical experts are filled where that helps. A layer stops
    when no move gains `min_gain`, so a steady load causes no moves.

    A small budget makes the first moves of a large one: calls with `max_moves=2`, each
    on the result of the one before, end where one call with a large budget does.

    Args:
      weight: [layers, experts] loads to place for.
      physical_to_logical_map: [layers, physical experts] int32, the present placement;
        -1 if empty.
      num_gpus: devices; divides the number of physical experts.
      max_moves: physical experts moved per layer, at most: those that hold another
        expert afterwards. A swap needs two. This and `min_gain` may be traced: other
        values do not recompile.
      min_gain: relative fall of the (smoothed) peak device load that each moved
        physical expert must bring. 1e-6 stops at rounding and at gains too small to
        notice; 1e-4 spends moves only on visible imbalance.
      max_replicas: an expert that has as many replicas gets no further one, as for
        tables of this width. None: no limit.
      device_capacity: [num_gpus] relative speeds; 0 for a dead device, whose physical
        experts become -1 and count as no moves. Inside jit, experts that the budget
        cannot bring back stay where they are.
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
      ValueError: for loads, placements, capacities or sizes that do not fit, and
        outside jit for a `max_moves` that cannot bring back all experts of dead
        devices.

    Examples:
      Swapping experts 0 and 2 takes two moves:

      >>> old = jnp.array([[0, 1, 2, 3]])
      >>> new, moves = refine_placement([[6, 5, 2, 1]], old, 2, max_moves=2)
      >>> new.tolist(), moves.tolist()
      ([[2, 1, 0, 3]], [2])
    """
    weight = as_loads(weight, check_values)
    old = as_placement(physical_to_logical_map, weight.shape[1])
    _check_refine(weight, old, num_gpus, max_moves, num_nodes, max_replicas)
    capacity = as_capacity(
        device_capacity, num_gpus, old.shape[1], weight.shape[1], check_values
    )
    _check_budget(old, capacity, max_moves, weight.shape[1])
    if home is not None:
        home = jnp.asarray(home, jnp.int32)
    rules = Rules(
        num_nodes=num_nodes,
        has_homes=home is not None,
        has_budget=True,
        separate=separate,
    )
    limits = _Limits(
        max_moves,
        min_gain,
        _NO_LIMIT if max_replicas is None else max_replicas,
        remote_price,
    )
    new, _, num_moves = _refine(weight, old, capacity, home, limits, rules)
    return new, num_moves


def refine_and_look_ahead(
    weight_LE: jax.Array,
    expert_LS: jax.Array,
    capacity_D: jax.Array,
    *,
    max_moves: jax.Array,
    min_gain: jax.Array,
    max_replicas: int,
) -> tuple[jax.Array, jax.Array]:
    """Refines as `refine_placement` does, and tells where further calls would lead.

    For use inside jit: nothing is checked.

    Args:
      weight_LE: [layers, experts] float32 loads, from `as_loads`.
      expert_LS: [layers, physical experts] int32, the present placement.
      capacity_D: [devices] float32 relative speeds.
      max_moves: [layers] int32.
      min_gain: [layers] float32.
      max_replicas: see `refine_placement`.

    Returns:
      new: [layers, physical experts] int32, at most `max_moves` away.
      end: [layers, physical experts] int32, where repeated calls for these loads end.

    Examples:
      >>> weight = jnp.array([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0]])
      >>> new, end = refine_and_look_ahead(
      ...     weight, jnp.arange(8)[None], jnp.ones(4), max_moves=jnp.array([2]),
      ...     min_gain=jnp.array([1e-4]), max_replicas=1)
      >>> new.tolist(), end.tolist()
      ([[4, 1, 2, 3, 0, 5, 6, 7]], [[4, 1, 6, 3, 0, 5, 2, 7]])
    """
    limits = _Limits(max_moves, min_gain, max_replicas)
    rules = Rules(has_budget=True, looks_ahead=True)
    new, end, _ = _refine(weight_LE, expert_LS, capacity_D, None, limits, rules)
    return new, end


@functools.partial(jax.jit, static_argnums=5)
def _refine(
    weight_LE: jax.Array,
    old_LS: jax.Array,
    capacity_D: jax.Array,
    home_LE: jax.Array | None,
    limits: _Limits,
    rules: Rules,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the new placement, the one at the end of the search, and moves."""
    num_layers, num_experts = weight_LE.shape
    per_device = old_LS.shape[1] // capacity_D.shape[0]
    home = jnp.int32(-1) if home_LE is None else home_LE
    max_moves = jnp.asarray(limits.max_moves, jnp.int32)
    min_gain = jnp.asarray(limits.min_gain, jnp.float32)
    per_share_D = per_share(capacity_D)
    is_alive_1S = jnp.repeat(per_share_D > 0, per_device)[None]
    kept_LS = jnp.where(is_alive_1S, old_LS, -1)
    problem = PlacementProblem(
        weight=normalise(weight_LE),
        per_share=jnp.broadcast_to(per_share_D, (num_layers, len(per_share_D))),
        home=jnp.broadcast_to(home, weight_LE.shape),
        original=kept_LS,
        max_moves=jnp.broadcast_to(max_moves, num_layers),
        min_gain=jnp.broadcast_to(min_gain, num_layers),
    )
    most_moves = old_LS.shape[1] if rules.looks_ahead else max_moves.max()
    search_limits = Limits(
        # Before a move, two repairs may end in a step that finds nothing. (A move that
        # takes another back does not count.)
        max_steps=jnp.asarray(4 * most_moves + 3, jnp.int32),
        max_replicas=jnp.asarray(limits.max_replicas, jnp.int32),
        remote_price=jnp.asarray(limits.remote_price, jnp.float32),
    )
    new_LS, end_LS, _ = search(problem, kept_LS, rules, search_limits)
    num_moves_L = (new_LS != kept_LS).sum(axis=1, dtype=jnp.int32)

    def keep_lost(old_S: jax.Array, new_S: jax.Array) -> jax.Array:
        """Leaves experts that have no other replica on their dead device."""
        is_lost_E = count_replicas(new_S, num_experts) == 0
        stays_S = ~is_alive_1S[0] & (old_S >= 0) & is_lost_E[old_S]
        return jnp.where(stays_S, old_S, new_S)

    keep = jax.vmap(keep_lost)
    return keep(old_LS, new_LS), keep(old_LS, end_LS), num_moves_L


def _check_refine(
    weight: jax.Array,
    old: jax.Array,
    num_gpus: int,
    max_moves: int | jax.Array,
    num_nodes: int,
    max_replicas: int | None,
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
    if max_replicas is not None and not is_count(max_replicas):
        raise ValueError(
            f"{max_replicas=} must be at least 1, an int below 2**31, or None."
        )
    if not is_traced(max_moves):
        if np.asarray(max_moves).dtype.kind not in "iu":
            raise ValueError(f"{max_moves=} must be an integer; round it down.")
        if np.min(max_moves) < 0:
            raise ValueError(
                f"{max_moves=} must not be negative; use 0 to move nothing."
            )


def _check_budget(
    old: jax.Array, capacity: jax.Array, max_moves: int | jax.Array, num_experts: int
) -> None:
    """Raises if the budget cannot bring back the experts of dead devices."""
    if any(is_traced(value) for value in (old, capacity, max_moves)):
        return
    expert_LDI = np.asarray(old).reshape(len(old), len(capacity), -1)
    kept_LS = expert_LDI[:, np.asarray(capacity) > 0].reshape(len(old), -1)
    needed_L = num_experts - count_held(kept_LS, num_experts)
    is_short_L = needed_L > np.asarray(max_moves)
    if is_short_L.any():
        layer = int(np.argmax(is_short_L))
        raise ValueError(
            f"{max_moves=} cannot bring back the {needed_L[layer]} experts of layer "
            f"{layer} that have no replica on a device alive; use max_moves="
            f"{needed_L.max()} or more."
        )
