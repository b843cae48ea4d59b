"""Local search over placements: swaps and copies that cool the hottest device.

A step looks at the device that is furthest over its share of the load, and at two
kinds of moves: *swap* one of its replicas with one of another device, or *copy* one
of its experts over a replica on another device (the copied expert then has one
replica more, the overwritten one has one less). Of these the move is made that
lowers the objective most per slot that it changes. The objective of a layer is

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

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.moves import (
    URGENT,
    Homes,
    Limits,
    Placed,
    Problem,
    Rules,
    View,
    find_homes,
    look,
    score_copies,
    score_swaps,
)


def search(
    problem: Problem, expert: jax.Array, rules: Rules, limits: Limits
) -> jax.Array:
    """Moves replicas until no move is worth it, in all layers at once.

    Args:
      problem: what is to be placed, leaves with a leading axis of layers.
      expert: [layers, slots] int32, the placement to start from, -1 for an empty slot.
      rules: static settings.
      limits: settings that may be traced.

    Returns:
      [layers, slots] int32.

    Examples:
      Two devices with two slots each: the heavy experts, 0 and 1, are parted.

      >>> problem = Problem(
      ...     weight=jnp.array([[0.4, 0.4, 0.1, 0.1]]), per_share=jnp.full((1, 2), 2.0),
      ...     home=jnp.full((1, 4), -1), original=jnp.array([[0, 1, 2, 3]]))
      >>> limits = Limits(
      ...     max_steps=jnp.int32(9), max_moves=jnp.int32(4),
      ...     min_gain=jnp.float32(1e-6), remote_price=jnp.float32(0))
      >>> search(problem, problem.original, Rules(), limits).tolist()
      [[2, 1, 0, 3]]
    """

    def start(problem: Problem, expert_S: jax.Array) -> Placed:
        return Placed(
            expert_S=expert_S,
            count_E=count_replicas(expert_S, problem.weight.shape[0]),
            is_parted=jnp.bool_(not rules.separate),
            is_done=jnp.bool_(False),
            best_S=expert_S,
            best_cost=jnp.float32(jnp.inf),
        )

    def goes_on(carry: tuple[jax.Array, Placed]) -> jax.Array:
        step, placed = carry
        return (step < limits.max_steps) & ~placed.is_done.all()

    def move(carry: tuple[jax.Array, Placed]) -> tuple[jax.Array, Placed]:
        step, placed = carry
        step_layer = jax.vmap(lambda p, s: _step(p, s, rules, limits))
        return step + 1, step_layer(problem, placed)

    placed = jax.vmap(start)(problem, expert)
    return lax.while_loop(goes_on, move, (jnp.int32(0), placed))[1].best_S


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


def _step(problem: Problem, placed: Placed, rules: Rules, limits: Limits) -> Placed:
    """The best move of one layer."""
    num_gpus, num_slots = problem.per_share.shape[0], placed.expert_S.shape[0]
    per_gpu = num_slots // num_gpus
    view = look(problem, placed)
    homes = find_homes(problem, placed, view, rules) if rules.has_homes else None
    cost = _cost(view, homes, rules, limits)
    is_best = cost < placed.best_cost
    swap_IG, slot_IG = score_swaps(problem, view, homes, rules, limits)
    copy_IG, slot_G = score_copies(problem, placed, view, homes, rules, limits)

    score = jnp.concatenate([swap_IG.reshape(-1), copy_IG.reshape(-1)])
    best = jnp.argmax(score).astype(jnp.int32)
    is_copy = best >= num_slots
    i, g = best % num_slots // num_gpus, best % num_gpus
    j = jnp.where(is_copy, slot_G[g], slot_IG[i, g])
    expert_i, expert_j = view.expert_I[i], view.expert_KG[j, g]
    is_worth_it = score[best] > limits.min_gain
    # Replicas that cannot be parted (too few experts, no moves left) stay together.
    is_stuck = view.to_part & (score[best] < URGENT / 2)
    goes = is_worth_it & ~is_stuck & ~placed.is_done
    slot_i, slot_j = view.hot * per_gpu + i, g * per_gpu + j
    stays_i = is_copy | ~goes
    expert_S = placed.expert_S
    expert_S = expert_S.at[slot_i].set(jnp.where(stays_i, expert_S[slot_i], expert_j))
    expert_S = expert_S.at[slot_j].set(jnp.where(goes, expert_i, expert_S[slot_j]))
    changes = (goes & is_copy).astype(jnp.int32)
    count_E = placed.count_E.at[expert_i].add(changes)
    changes = jnp.where(expert_j >= 0, changes, 0)
    count_E = count_E.at[expert_j].add(-changes)
    return Placed(
        expert_S=expert_S,
        count_E=count_E,
        is_parted=placed.is_parted | is_stuck,
        is_done=placed.is_done | ~(is_worth_it | is_stuck),
        best_S=jnp.where(is_best, placed.expert_S, placed.best_S),
        best_cost=jnp.where(is_best, cost, placed.best_cost),
    )


def _cost(view: View, homes: Homes | None, rules: Rules, limits: Limits) -> jax.Array:
    """The objective with the true peak; what has to be mended counts above all."""
    cost = jnp.log(view.peak)
    if homes is not None:
        cost += limits.remote_price * (homes.away_KG * view.load_KG).sum()
    to_mend = view.num_missing.astype(jnp.float32) * URGENT
    if rules.separate:
        to_mend += view.num_twins.astype(jnp.float32)
    return cost + URGENT * to_mend
