"""Which layers are planned, and their new tables: array arithmetic, inside jit.

Shape suffixes: see `eplb_jax`; here P layers of a plan.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement import ExpertTables, balancedness, refine_placement
from eplb_jax.serving.settings import BalancerSettings
from eplb_jax.serving.state import BalancerState, RebalancePlan, tables_of


def make_plan(settings: BalancerSettings, state: BalancerState) -> RebalancePlan:
    """Plans the layers whose turn it is; changes nothing if no plan is due.

    Args:
      settings: of the balancer.
      state: of the server.

    Returns:
      A `RebalancePlan` of `settings.plan_size` layers.
    """
    score_L = score_layers(settings, state)
    is_stranded_L = find_stranded(settings, state)
    is_due = (state.step > 0) & (state.step % settings.every == 0)
    is_due &= (score_L < settings.below).any()
    is_due |= is_stranded_L.any()
    return lax.cond(
        is_due,
        functools.partial(_plan, settings),
        functools.partial(_no_plan, settings),
        state,
        score_L,
        is_stranded_L,
    )


def score_layers(settings: BalancerSettings, state: BalancerState) -> jax.Array:
    """Computes the balancedness of each layer for its estimated load.

    Args:
      settings: of the balancer.
      state: of the server.

    Returns:
      [layers] float32.
    """
    loads_LE = settings.estimator.estimate(state.loads)
    placement_LS = state.tables.physical_to_logical_map
    return balancedness(loads_LE, placement_LS, settings.num_devices, state.capacity)


def find_stranded(settings: BalancerSettings, state: BalancerState) -> jax.Array:
    """Finds the layers that have experts on a device of capacity 0.

    Args:
      settings: of the balancer.
      state: of the server.

    Returns:
      [layers] bool.
    """
    expert_LDI = state.tables.physical_to_logical_map.reshape(
        settings.num_layers, settings.num_devices, -1
    )
    is_vacated_1D1 = (state.capacity <= 0)[None, :, None]
    return ((expert_LDI >= 0) & is_vacated_1D1).any(axis=(1, 2))


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


def _plan(
    settings: BalancerSettings,
    state: BalancerState,
    score_L: jax.Array,
    is_stranded_L: jax.Array,
) -> RebalancePlan:
    c, num_layers = settings, settings.num_layers
    is_wanted_L = is_stranded_L | (score_L < c.below)
    turn_L = (jnp.arange(num_layers, dtype=jnp.int32) - state.cursor) % num_layers
    # Stranded layers first, then those below the threshold, each in turn.
    class_L = jnp.where(is_stranded_L, 0, jnp.where(is_wanted_L, 1, 2))
    layers_P = jnp.argsort(class_L * num_layers + turn_L)[: c.plan_size]
    layers_P = layers_P.astype(jnp.int32)
    is_stranded_P, is_wanted_P = is_stranded_L[layers_P], is_wanted_L[layers_P]
    loads_PE = c.estimator.estimate(state.loads)[layers_P]
    old = tables_of(state, layers_P)
    old_PS = old.physical_to_logical_map
    budget = jnp.where(is_stranded_P.any(), c.num_physical_experts, c.move_budget)
    new_PS, _ = refine_placement(
        loads_PE,
        old_PS,
        c.num_devices,
        max_moves=budget,
        min_gain=c.min_gain_per_move,
        device_capacity=state.capacity,
    )
    score_P = balancedness(loads_PE, new_PS, c.num_devices, state.capacity)
    gain_P = score_P - score_L[layers_P]
    is_taken_P = is_wanted_P & (is_stranded_P | (gain_P >= c.min_gain))
    # Tables that lack an expert, or are too narrow for the placement, are not valid.
    new = ExpertTables.from_placement(new_PS, c.num_experts, c.max_replicas)
    tables = choose_tables(is_taken_P & new.is_valid(), new, old)
    new_PS = tables.physical_to_logical_map
    is_moved_PS = (new_PS != old_PS) & (new_PS >= 0)
    last = jnp.where(is_wanted_P, turn_L[layers_P], 0).max()
    return RebalancePlan(
        layers=layers_P,
        tables=tables,
        is_changed=(new_PS != old_PS).any(axis=1),
        num_moves=is_moved_PS.sum(axis=1, dtype=jnp.int32),
        cursor=(state.cursor + last + 1) % num_layers,
        is_refused=jnp.zeros((), jnp.bool_),
    )


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
        cursor=state.cursor,
        is_refused=jnp.zeros((), jnp.bool_),
    )
