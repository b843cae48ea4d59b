"""Local search over placements: moves that cool the hottest device.

A step takes the device that is furthest over its share of the load, and considers
three kinds of moves: *swap* one of its replicas with one of another device; *copy* one
of its experts over a replica on another device (the copied expert then has one replica
more, the overwritten one has one less); or *replace* one of its replicas by an expert
that it does not have. The move that lowers the objective most, per physical expert
that it changes, is made. The objective of a layer is

    log peak + remote_price * remote share,     peak = (sum_d u_d^16)^(1/16)

where u_d is the load of device d over its fair share. The maximum is smoothed so that
a move which also cools the second hottest device is worth more; the price is for load
that is served away from an expert's home node. The result is the placement on the way
with the least true maximum (and price), so it is never worse than the start.

Shape suffixes, for one layer: see `eplb_jax`; here also J physical experts of the
hottest device. Tables are [I, D]: the long axis is the minor one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.arrays import count_replicas
from eplb_jax.placement.features import (
    URGENT,
    Homes,
    SearchFeatures,
    featurize,
    find_budget,
    find_effects,
    find_homes,
)
from eplb_jax.placement.problem import Limits, PlacementProblem, Rules, SearchState
from eplb_jax.placement.scores import score_copies, score_replacements, score_swaps


@functools.partial(jax.jit, static_argnums=2)
def search(
    problem: PlacementProblem, expert: jax.Array, rules: Rules, limits: Limits
) -> tuple[jax.Array, jax.Array]:
    """Moves replicas until no move is worth it, in all layers at once.

    Args:
      problem: leaves with a leading axis of layers.
      expert: [layers, physical experts] int32, the placement to start from, -1 if
        empty.
      rules: static settings.
      limits: settings that may be traced.

    Returns:
      expert: [layers, physical experts] int32, the best placement on the way.
      cost: [layers] float32, its objective.
    """

    def start(problem: PlacementProblem, expert_S: jax.Array) -> SearchState:
        return SearchState(
            expert_S=expert_S,
            count_E=count_replicas(expert_S, problem.weight.shape[0]),
            is_separated=jnp.bool_(not rules.separate),
            is_done=jnp.bool_(False),
            best_S=expert_S,
            best_cost=jnp.float32(jnp.inf),
        )

    def goes_on(carry: tuple[jax.Array, SearchState]) -> jax.Array:
        step, state = carry
        return (step < limits.max_steps) & ~state.is_done.all()

    def move(carry: tuple[jax.Array, SearchState]) -> tuple[jax.Array, SearchState]:
        step, state = carry
        step_layer = jax.vmap(lambda p, s: _step(p, s, rules, limits))
        return step + 1, step_layer(problem, state)

    state = jax.vmap(start)(problem, expert)
    state = lax.while_loop(goes_on, move, (jnp.int32(0), state))[1]
    return state.best_S, state.best_cost


def _step(
    problem: PlacementProblem, state: SearchState, rules: Rules, limits: Limits
) -> SearchState:
    """Makes the best move of one layer."""
    num_devices = problem.per_share.shape[0]
    num_physical_experts = state.expert_S.shape[0]
    per_device = num_physical_experts // num_devices
    features = featurize(problem, state)
    homes = find_homes(problem, state, features, rules) if rules.has_homes else None
    cost = _cost(features, homes, rules, limits)
    is_best = cost < state.best_cost
    effects = find_effects(problem, state, features, homes)
    budget = find_budget(problem, features, limits) if rules.has_budget else None
    given = (homes, budget, limits.remote_price)
    swap_JD, partner_JD = score_swaps(features, *given)
    copy_JD, overwritten_D = score_copies(features, effects, *given)
    replace_E, replaced = score_replacements(problem, features, effects, *given)

    tables = (swap_JD.reshape(-1), copy_JD.reshape(-1), replace_E)
    score = jnp.concatenate(tables)
    best = jnp.argmax(score).astype(jnp.int32)
    is_worth_it = score[best] > limits.min_gain
    # Replicas that cannot be separated (too few experts, no moves left) stay together.
    is_stuck = features.to_separate & (score[best] < URGENT / 2)
    goes = is_worth_it & ~is_stuck & ~state.is_done
    # Both score tables of [J, D] have as many entries as there are physical experts.
    is_swap = best < num_physical_experts
    is_replacement = best >= 2 * num_physical_experts
    j = jnp.where(is_replacement, replaced, best % num_physical_experts // num_devices)
    d = best % num_devices
    i = jnp.where(is_swap, partner_JD[j, d], overwritten_D[d])
    physical_j, physical_i = features.hot * per_device + j, d * per_device + i
    expert_j, expert_i = features.expert_J[j], features.expert_ID[i, d]
    other = jnp.where(is_replacement, best - 2 * num_physical_experts, expert_i)
    # Comparisons with all physical experts instead of scatters: they fuse into one
    # loop, where each scatter is another program to compile and to start.
    physical_S = jnp.arange(num_physical_experts, dtype=jnp.int32)
    writes_j_S = goes & (is_swap | is_replacement) & (physical_S == physical_j)
    writes_i_S = goes & ~is_replacement & (physical_S == physical_i)
    expert_S = jnp.where(writes_j_S, other, state.expert_S)
    expert_S = jnp.where(writes_i_S, expert_j, expert_S)
    expert_E = jnp.arange(state.count_E.shape[0], dtype=jnp.int32)
    gains_E = expert_E == jnp.where(is_replacement, other, expert_j)
    loses_E = expert_E == jnp.where(is_replacement, expert_j, expert_i)
    change_E = gains_E.astype(jnp.int32) - loses_E.astype(jnp.int32)
    count_E = state.count_E + jnp.where(goes & ~is_swap, change_E, 0)
    return SearchState(
        expert_S=expert_S,
        count_E=count_E,
        is_separated=state.is_separated | is_stuck,
        is_done=state.is_done | ~(is_worth_it | is_stuck),
        best_S=jnp.where(is_best, state.expert_S, state.best_S),
        best_cost=jnp.where(is_best, cost, state.best_cost),
    )


def _cost(
    features: SearchFeatures, homes: Homes | None, rules: Rules, limits: Limits
) -> jax.Array:
    """Computes the objective with the true peak; defects count above all else."""
    cost = jnp.log(features.peak)
    if homes is not None:
        cost += limits.remote_price * (homes.away_ID * features.load_ID).sum()
    defects = features.num_missing.astype(jnp.float32) * URGENT
    if rules.separate:
        defects += features.num_duplicates.astype(jnp.float32)
    return cost + URGENT * defects
