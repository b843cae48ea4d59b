"""Local search over placements: moves that cool the hottest device.

A step looks at the device that is furthest over its share of the load, and at three
kinds of moves: *swap* one of its replicas with one of another device; *copy* one of
its experts over a replica on another device (the copied expert then has one replica
more, the overwritten one has one less); or *replace* one of its replicas by an expert
that it has not. Of these the move is made that lowers the objective most per slot that
it changes. The objective of a layer is

    log peak + remote_price * remote share,     peak = (sum_g u_g^16)^(1/16)

where u_g is the load of device g over its fair share: a smooth maximum, so that a
move which also cools the second hottest device is worth more, and a price for load
that is served away from an expert's home node. Of all placements on the way, that
with the least true maximum (and price) is the result, so it is never worse than the
start.

Shape suffixes, for one layer: E experts, S slots, G devices, K slots of a device,
I slots of the hottest device. Tables are [K, G]: the long axis is the minor one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.moves import (
    URGENT,
    Homes,
    Limits,
    PlacementProblem,
    Rules,
    SearchFeatures,
    SearchState,
    count,
    featurize,
    find_budget,
    find_homes,
)
from eplb_jax.placement.scores import score_copies, score_replacements, score_swaps


@functools.partial(jax.jit, static_argnums=2)
def search(
    problem: PlacementProblem, expert: jax.Array, rules: Rules, limits: Limits
) -> tuple[jax.Array, jax.Array]:
    """Moves replicas until no move is worth it, in all layers at once.

    Args:
      problem: what is to be placed, leaves with a leading axis of layers.
      expert: [layers, slots] int32, the placement to start from, -1 for an empty slot.
      rules: static settings.
      limits: settings that may be traced.

    Returns:
      expert: [layers, slots] int32, the best placement on the way.
      cost: [layers] float32, its objective.
    """

    def start(problem: PlacementProblem, expert_S: jax.Array) -> SearchState:
        return SearchState(
            expert_S=expert_S,
            count_E=count_replicas(expert_S, problem.weight.shape[0]),
            is_parted=jnp.bool_(not rules.separate),
            is_done=jnp.bool_(False),
            best_S=expert_S,
            best_cost=jnp.float32(jnp.inf),
        )

    def goes_on(carry: tuple[jax.Array, SearchState]) -> jax.Array:
        step, placed = carry
        return (step < limits.max_steps) & ~placed.is_done.all()

    def move(carry: tuple[jax.Array, SearchState]) -> tuple[jax.Array, SearchState]:
        step, placed = carry
        step_layer = jax.vmap(lambda p, s: _step(p, s, rules, limits))
        return step + 1, step_layer(problem, placed)

    placed = jax.vmap(start)(problem, expert)
    placed = lax.while_loop(goes_on, move, (jnp.int32(0), placed))[1]
    return placed.best_S, placed.best_cost


def count_replicas(expert_S: jax.Array, num_experts: int) -> jax.Array:
    """How many slots hold each expert.

    Args:
      expert_S: [...] int32, -1 for an empty slot.
      num_experts: logical experts.

    Returns:
      [num_experts] int32.

    Examples:
      >>> count_replicas(jnp.array([2, 0, 2, -1]), 4).tolist()
      [1, 0, 2, 0]
    """
    is_filled_S = (expert_S >= 0).astype(jnp.int32)
    return jnp.zeros(num_experts, jnp.int32).at[expert_S].add(is_filled_S)


def _step(
    problem: PlacementProblem, placed: SearchState, rules: Rules, limits: Limits
) -> SearchState:
    """The best move of one layer."""
    num_gpus, num_slots = problem.per_share.shape[0], placed.expert_S.shape[0]
    per_gpu = num_slots // num_gpus
    view = featurize(problem, placed)
    homes = find_homes(problem, placed, view, rules) if rules.has_homes else None
    cost = _cost(view, homes, rules, limits)
    is_best = cost < placed.best_cost
    counts = count(problem, placed, view, homes)
    budget = find_budget(problem, view, limits) if rules.has_budget else None
    given = (homes, budget, limits.remote_price)
    swap_IG, slot_IG = score_swaps(view, *given)
    copy_IG, slot_G = score_copies(view, counts, *given)
    replace_E, slot_h = score_replacements(problem, view, counts, *given)

    tables = (swap_IG.reshape(-1), copy_IG.reshape(-1), replace_E)
    score = jnp.concatenate(tables)
    best = jnp.argmax(score).astype(jnp.int32)
    is_worth_it = score[best] > limits.min_gain
    # Replicas that cannot be parted (too few experts, no moves left) stay together.
    is_stuck = view.to_part & (score[best] < URGENT / 2)
    goes = is_worth_it & ~is_stuck & ~placed.is_done
    is_swap = best < num_slots
    is_replacement = best >= 2 * num_slots
    i = jnp.where(is_replacement, slot_h, best % num_slots // num_gpus)
    g = best % num_gpus
    j = jnp.where(is_swap, slot_IG[i, g], slot_G[g])
    slot_i, slot_j = view.hot * per_gpu + i, g * per_gpu + j
    expert_i, expert_j = view.expert_I[i], view.expert_KG[j, g]
    other = jnp.where(is_replacement, best - 2 * num_slots, expert_j)
    # Comparisons with all slots, and not scatters: they fuse into one loop, where
    # each scatter is a program of its own to compile and to start.
    slot_S = jnp.arange(num_slots, dtype=jnp.int32)
    writes_i_S = goes & (is_swap | is_replacement) & (slot_S == slot_i)
    writes_j_S = goes & ~is_replacement & (slot_S == slot_j)
    expert_S = jnp.where(writes_i_S, other, placed.expert_S)
    expert_S = jnp.where(writes_j_S, expert_i, expert_S)
    expert_E = jnp.arange(placed.count_E.shape[0], dtype=jnp.int32)
    gains_E = expert_E == jnp.where(is_replacement, other, expert_i)
    loses_E = expert_E == jnp.where(is_replacement, expert_i, expert_j)
    change_E = gains_E.astype(jnp.int32) - loses_E.astype(jnp.int32)
    count_E = placed.count_E + jnp.where(goes & ~is_swap, change_E, 0)
    return SearchState(
        expert_S=expert_S,
        count_E=count_E,
        is_parted=placed.is_parted | is_stuck,
        is_done=placed.is_done | ~(is_worth_it | is_stuck),
        best_S=jnp.where(is_best, placed.expert_S, placed.best_S),
        best_cost=jnp.where(is_best, cost, placed.best_cost),
    )


def _cost(
    view: SearchFeatures, homes: Homes | None, rules: Rules, limits: Limits
) -> jax.Array:
    """The objective with the true peak; what has to be mended counts above all."""
    cost = jnp.log(view.peak)
    if homes is not None:
        cost += limits.remote_price * (homes.away_KG * view.load_KG).sum()
    to_mend = view.num_missing.astype(jnp.float32) * URGENT
    if rules.separate:
        to_mend += view.num_twins.astype(jnp.float32)
    return cost + URGENT * to_mend
