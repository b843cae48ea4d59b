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
that is served away from an expert's home node.

A search without a budget returns the placement on the way with the least true maximum
(and price). With a budget, the objective itself decides: where several devices are
equally hot, the maximum stays until the last of them is cooled. Which move is made
depends on the present placement alone, so a small budget makes the first moves of a
large one, and searches with small budgets, one after the other, end where a single
one with a large budget does.

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
    POWER,
    URGENT,
    Homes,
    SearchFeatures,
    featurize,
    find_effects,
    find_homes,
)
from eplb_jax.placement.problem import Limits, PlacementProblem, Rules, SearchState
from eplb_jax.placement.scores import score_copies, score_replacements, score_swaps


@functools.partial(jax.jit, static_argnums=2)
def search(
    problem: PlacementProblem, expert: jax.Array, rules: Rules, limits: Limits
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves replicas until no move is worth it, in all layers at once.

    Args:
      problem: leaves with a leading axis of layers.
      expert: [layers, physical experts] int32, the placement to start from, -1 if
        empty.
      rules: static settings.
      limits: settings that may be traced.

    Returns:
      kept: [layers, physical experts] int32, the best placement on the way within the
        budget.
      best: [layers, physical experts] int32, the best placement on the way. It is
        another one only if `rules.looks_ahead`.
      cost: [layers] float32, its objective.
    """

    def start(problem: PlacementProblem, expert_S: jax.Array) -> SearchState:
        return SearchState(
            expert_S=expert_S,
            count_E=count_replicas(expert_S, problem.weight.shape[0]),
            is_separated=jnp.bool_(not rules.separate),
            is_filled=jnp.bool_(False),
            is_within=jnp.bool_(True),
            is_done=jnp.bool_(False),
            best_S=expert_S,
            best_cost=jnp.float32(jnp.inf),
            best_defects=jnp.int32(jnp.iinfo(jnp.int32).max),
            kept_S=expert_S,
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
    cost = state.best_cost + URGENT * state.best_defects.astype(jnp.float32)
    return state.kept_S, state.best_S, cost


def _step(
    problem: PlacementProblem, state: SearchState, rules: Rules, limits: Limits
) -> SearchState:
    """Makes the best move of one layer."""
    num_devices = problem.per_share.shape[0]
    num_physical_experts = state.expert_S.shape[0]
    per_device = num_physical_experts // num_devices
    features = featurize(problem, state)
    homes = find_homes(problem, state, features, rules) if rules.has_homes else None
    cost, defects = _cost(features, homes, rules, limits)
    is_best = defects < state.best_defects
    is_best |= (defects == state.best_defects) & (cost < state.best_cost)
    effects = find_effects(problem, state, features, homes, limits.max_replicas)
    given = (homes, limits.remote_price)
    swap_JD, partner_JD = score_swaps(features, *given)
    copy_JD, overwritten_D = score_copies(features, effects, *given)
    replace_E, replaced = score_replacements(problem, features, effects, *given)
    if rules.has_budget:
        swap_JD = jnp.where(problem.max_moves >= 2, swap_JD, -jnp.inf)

    tables = (swap_JD.reshape(-1), copy_JD.reshape(-1), replace_E)
    score = jnp.concatenate(tables)
    best = jnp.argmax(score).astype(jnp.int32)
    least_gain = jnp.where(features.is_missing, -jnp.inf, problem.min_gain)
    is_worth_it = score[best] > least_gain
    # Replicas that cannot be separated (too few experts, no moves left) stay together,
    # and physical experts that can only be filled by making a device hotter stay empty.
    to_repair = features.to_separate | features.to_fill
    is_stuck = to_repair & (score[best] < URGENT / 2)
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
    writes_j_S = (is_swap | is_replacement) & (physical_S == physical_j)
    writes_i_S = ~is_replacement & (physical_S == physical_i)
    expert_S = jnp.where(writes_j_S, other, state.expert_S)
    expert_S = jnp.where(writes_i_S, expert_j, expert_S)
    is_within = state.is_within
    if rules.has_budget:
        num_changed = (expert_S != problem.original).sum(dtype=jnp.int32)
        fits = num_changed <= problem.max_moves
        if rules.looks_ahead:
            is_within &= fits | ~goes
        else:
            is_worth_it &= fits | is_stuck
            goes &= fits
    is_separated, is_filled = state.is_separated, state.is_filled
    if rules.has_budget:
        # What could not be repaired is tried after each move, as by the next search.
        is_separated = jnp.where(goes, not rules.separate, is_separated)
        is_filled &= ~goes
    expert_E = jnp.arange(state.count_E.shape[0], dtype=jnp.int32)
    gains_E = expert_E == jnp.where(is_replacement, other, expert_j)
    loses_E = expert_E == jnp.where(is_replacement, expert_j, expert_i)
    change_E = gains_E.astype(jnp.int32) - loses_E.astype(jnp.int32)
    count_E = state.count_E + jnp.where(goes & ~is_swap, change_E, 0)
    return SearchState(
        expert_S=jnp.where(goes, expert_S, state.expert_S),
        count_E=count_E,
        is_separated=is_separated | (is_stuck & features.to_separate),
        is_filled=is_filled | (is_stuck & features.to_fill),
        is_within=is_within,
        is_done=state.is_done | ~(is_worth_it | is_stuck),
        best_S=jnp.where(is_best, state.expert_S, state.best_S),
        best_cost=jnp.where(is_best, cost, state.best_cost),
        best_defects=jnp.where(is_best, defects, state.best_defects),
        kept_S=jnp.where(is_best & state.is_within, state.expert_S, state.kept_S),
    )


def _cost(
    features: SearchFeatures, homes: Homes | None, rules: Rules, limits: Limits
) -> tuple[jax.Array, jax.Array]:
    """Computes the objective, and counts the defects, which come before it.

    The peak is the true one unless there is a budget.
    """
    cost = jnp.log(features.peak)
    if rules.has_budget:
        cost += jnp.log(features.phi_D.sum()) / POWER
    if homes is not None:
        cost += limits.remote_price * (homes.away_ID * features.load_ID).sum()
    # All physical experts are fewer than 2^15.
    defects = (features.num_missing << 16) + features.num_vacant
    if rules.separate:
        defects += features.num_duplicates
    return cost, defects
