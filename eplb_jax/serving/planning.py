"""Which layers are planned, and their new tables: array arithmetic, inside jit.

Shape suffixes: see `eplb_jax`; here P layers of a plan.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement import (
    ExpertTables,
    as_loads,
    device_uses,
    refine_and_look_ahead,
    score_placement,
)
from eplb_jax.serving.settings import BalancerSettings
from eplb_jax.serving.state import BalancerState, RebalancePlan, tables_of

# Of a device's fair share: what a device must get for a layer that is due to change.
_LEAST_USE = 0.05
# As for `refine_placement`: moves of a layer that is due may gain as little.
_LEAST_GAIN = 1e-6


def make_plan(settings: BalancerSettings, state: BalancerState) -> RebalancePlan:
    """Plans the layers whose turn it is; changes nothing if no plan is due.

    Args:
      settings: of the balancer.
      state: of the server.

    Returns:
      A `RebalancePlan` of `settings.plan_size` layers.
    """
    score_L = score_layers(settings, state)
    placement_LS = state.tables.physical_to_logical_map
    is_stranded_L = count_stranded(placement_LS, state.capacity) > 0
    is_time = (state.step > 0) & (state.step % settings.every == 0)
    is_wanted_L = state.is_due | (score_L < settings.below)
    return lax.cond(
        (is_time & is_wanted_L.any()) | is_stranded_L.any(),
        functools.partial(_plan, settings),
        functools.partial(_no_plan, settings),
        state,
        score_L,
        is_stranded_L,
    )


def score_layers(settings: BalancerSettings, state: BalancerState) -> jax.Array:
    """Computes the balancedness of each layer for its estimated load.

    A layer that has load on a device of capacity 0 scores 0.

    Args:
      settings: of the balancer.
      state: of the server.

    Returns:
      [layers] float32.
    """
    loads_LE = as_loads(settings.estimator.estimate(state.loads))
    placement_LS = state.tables.physical_to_logical_map
    return score_placement(loads_LE, placement_LS, state.capacity)


@jax.jit
def count_stranded(expert_LS: jax.Array, capacity_D: jax.Array) -> jax.Array:
    """Counts the experts on devices of capacity 0.

    Args:
      expert_LS: [layers, physical experts] int32, -1 if empty.
      capacity_D: [devices] float32.

    Returns:
      [layers] int32.
    """
    return _count_on(expert_LS >= 0, capacity_D <= 0)


@jax.jit
def count_vacant(expert_LS: jax.Array, capacity_D: jax.Array) -> jax.Array:
    """Counts the empty physical experts on all other devices.

    Args:
      expert_LS: [layers, physical experts] int32, -1 if empty.
      capacity_D: [devices] float32.

    Returns:
      [layers] int32.
    """
    return _count_on(expert_LS < 0, capacity_D > 0)


def choose_tables(
    is_new: jax.Array, new: ExpertTables, old: ExpertTables
) -> ExpertTables:
    """Takes the new tables of some layers, and the old ones of the others.

    Args:
      is_new: [n] bool.
      new: [n, ...].
      old: [n, ...].

    Returns:
      `ExpertTables` [n, ...].
    """

    def choose(new_P: jax.Array, old_P: jax.Array) -> jax.Array:
        return jnp.where(is_new.reshape(-1, *(1,) * (new_P.ndim - 1)), new_P, old_P)

    return jax.tree.map(choose, new, old)


def _count_on(is_counted_LS: jax.Array, is_there_D: jax.Array) -> jax.Array:
    per_device = is_counted_LS.shape[1] // len(is_there_D)
    is_there_1S = jnp.repeat(is_there_D, per_device)[None]
    return (is_counted_LS & is_there_1S).sum(axis=1, dtype=jnp.int32)


def _plan(
    settings: BalancerSettings,
    state: BalancerState,
    score_L: jax.Array,
    is_stranded_L: jax.Array,
) -> RebalancePlan:
    c, num_layers = settings, settings.num_layers
    is_wanted_L = is_stranded_L | state.is_due | (score_L < c.below)
    turn_L = (jnp.arange(num_layers, dtype=jnp.int32) - state.cursor) % num_layers
    # Stranded layers first, then those below the threshold, each in turn.
    class_L = jnp.where(is_stranded_L, 0, jnp.where(is_wanted_L, 1, 2))
    layers_P = jnp.argsort(class_L * num_layers + turn_L)[: c.plan_size]
    layers_P = layers_P.astype(jnp.int32)
    is_stranded_P, is_wanted_P = is_stranded_L[layers_P], is_wanted_L[layers_P]
    is_due_P = state.is_due[layers_P]
    loads_PE = as_loads(c.estimator.estimate(state.loads)[layers_P])
    old = tables_of(state, layers_P)
    old_PS = old.physical_to_logical_map
    least_gain = min(c.min_gain_per_move, _LEAST_GAIN)
    new_PS, end_PS = refine_and_look_ahead(
        loads_PE,
        old_PS,
        state.capacity,
        max_moves=jnp.where(is_stranded_P, c.num_physical_experts, c.move_budget),
        min_gain=jnp.where(is_due_P, least_gain, c.min_gain_per_move),
        max_replicas=old.max_replicas,
    )
    # A plan is the beginning of a way; what counts is where the way ends.
    score_P = score_placement(loads_PE, end_PS, state.capacity)
    is_worth_it_P = score_P * (1 - c.min_gain) >= score_L[layers_P]
    is_used_P = _is_used(loads_PE, old_PS, end_PS, state.capacity)
    is_taken_P = is_stranded_P | is_worth_it_P | (is_due_P & is_used_P)
    differs_P = (new_PS != old_PS).any(axis=1) & is_wanted_P
    # Tables that lack an expert are not valid.
    new = ExpertTables.from_placement(new_PS, c.num_experts, c.max_replicas)
    is_changed_P = differs_P & is_taken_P & new.is_valid()
    tables = choose_tables(is_changed_P, new, old)
    new_PS = tables.physical_to_logical_map
    is_moved_PS = (new_PS != old_PS) & (new_PS >= 0)
    last = jnp.where(is_wanted_P, turn_L[layers_P], 0).max()
    return RebalancePlan(
        layers=layers_P,
        tables=tables,
        is_changed=is_changed_P,
        num_moves=is_moved_PS.sum(axis=1, dtype=jnp.int32),
        is_due=is_due_P & is_changed_P,
        is_rejected=differs_P & ~is_changed_P,
        cursor=(state.cursor + last + 1) % num_layers,
        is_refused=jnp.zeros((), jnp.bool_),
    )


def _is_used(
    loads_PE: jax.Array, old_PS: jax.Array, end_PS: jax.Array, capacity_D: jax.Array
) -> jax.Array:
    """Tells whether idle speed is used, or empty physical experts are filled: [n]."""
    old_PD, end_PD = (device_uses(loads_PE, e, capacity_D) for e in (old_PS, end_PS))
    is_more_PD = (old_PD < 1) & (end_PD - old_PD >= _LEAST_USE)
    num_vacant = [count_vacant(expert, capacity_D) for expert in (old_PS, end_PS)]
    return is_more_PD.any(axis=1) | (num_vacant[1] < num_vacant[0])


def _no_plan(
    settings: BalancerSettings, state: BalancerState, *scores: jax.Array
) -> RebalancePlan:
    del scores
    layers_P = jnp.arange(settings.plan_size, dtype=jnp.int32)
    return RebalancePlan(
        layers=layers_P,
        tables=tables_of(state, layers_P),
        is_changed=jnp.zeros(settings.plan_size, jnp.bool_),
        num_moves=jnp.zeros(settings.plan_size, jnp.int32),
        is_due=state.is_due[layers_P],
        is_rejected=jnp.zeros(settings.plan_size, jnp.bool_),
        cursor=state.cursor,
        is_refused=jnp.zeros((), jnp.bool_),
    )
