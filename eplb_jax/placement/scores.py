"""What each kind of move is worth: a swap, a copy, a replacement.

All scores are falls of the objective per slot that a move changes; -inf where it is
not allowed, and above `URGENT` where it mends what must not stay.

Shape suffixes, for one layer: E experts, S slots, G devices, K slots of a device,
I slots of the hottest device. Tables are [K, G]: the long axis is the minor one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.moves import (
    URGENT,
    Budget,
    Counts,
    Homes,
    PlacementProblem,
    SearchFeatures,
    phi,
)

_NEVER = jnp.iinfo(jnp.int32).max
_NOT_PREFERRED = 1 << 30


def score_swaps(
    view: SearchFeatures,
    homes: Homes | None,
    budget: Budget | None,
    remote_price: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What a swap of replica i with the best one of device g is worth.

    Args:
      view: of `featurize`.
      homes: of `find_homes`, or None.
      budget: of `find_budget`, or None.
      remote_price: [] float32.

    Returns:
      score: [I, G] float32.
      slot: [I, G] int32, that best one.
    """
    per_gpu, num_gpus = view.expert_KG.shape
    per_share_h = view.per_share_G[view.hot]
    used_h, phi_h = view.used_G[view.hot], view.phi_G[view.hot]
    # sum(phi) is convex in what a swap moves, and nearly symmetric about the amount
    # that makes both devices equally hot: of the replicas of device g, the one whose
    # swap comes nearest to that amount is the best. So phi is not needed K * I * G
    # times; the slot number rides in the low bits of the distance.
    ideal_G = (used_h - view.used_G) / jnp.maximum(per_share_h + view.per_share_G, 1e-9)
    moved_KIG = view.load_I[None, :, None] - view.load_KG[:, None]
    distance_KIG = jnp.abs(moved_KIG - ideal_G[None, None])
    slot_bits = (per_gpu - 1).bit_length()
    slot_K11 = jnp.arange(per_gpu, dtype=jnp.int32)[:, None, None]
    key_KIG = lax.bitcast_convert_type(distance_KIG, jnp.int32)
    key_KIG = (key_KIG >> slot_bits << slot_bits) | slot_K11
    # Pairs of replicas on one device: how many a swap parts, less those it makes.
    here_KG = (view.expert_KG[:, None] == view.expert_I[None, :, None]).any(axis=1)
    parts_IG = (view.twins_KG[:, view.hot] > 1).astype(jnp.int32)[:, None]
    parts_IG -= (view.there_IG > 0).astype(jnp.int32)
    parts_KG = (view.twins_KG > 1).astype(jnp.int32) - here_KG.astype(jnp.int32)
    parts_KIG = parts_KG[:, None] + parts_IG[None]
    is_allowed_KIG = view.is_filled_KG[:, None] & (parts_KIG >= 0)
    if homes is not None:
        j_stays_KG = homes.is_last_KG & (homes.away_j_KG > 0)
        i_stays_IG = homes.is_last_KG[:, view.hot][:, None] & (homes.away_i_IG > 0)
        is_allowed_KIG &= ~j_stays_KG[:, None] & ~i_stays_IG[None]
    is_less_liked = view.to_part & (parts_KIG <= 0)
    key_KIG = jnp.where(is_less_liked, key_KIG | _NOT_PREFERRED, key_KIG)
    key_IG = jnp.where(is_allowed_KIG, key_KIG, _NEVER).min(axis=0)
    gpu_1G = jnp.arange(num_gpus, dtype=jnp.int32)[None]
    is_valid_IG = (key_IG != _NEVER) & (gpu_1G != view.hot) & view.is_filled_I[:, None]
    is_valid_IG &= ~view.is_missing
    slot_IG = jnp.where(is_valid_IG, key_IG & ((1 << slot_bits) - 1), 0)

    def pick(value_KG: jax.Array) -> jax.Array:
        return jnp.take_along_axis(value_KG, slot_IG, axis=0)

    load_IG = pick(view.load_KG)
    moved_IG = view.load_I[:, None] - load_IG
    gain_IG = phi_h - phi(used_h - moved_IG * per_share_h)
    phi_IG = phi(view.used_G[None] + moved_IG * view.per_share_G[None])
    score_IG = (gain_IG + view.phi_G[None] - phi_IG) * view.scale
    if homes is not None:
        more_i_IG = homes.away_i_IG - homes.away_KG[:, view.hot][:, None]
        more_j_IG = pick(homes.away_j_KG - homes.away_KG)
        remote_IG = more_i_IG * view.load_I[:, None] + more_j_IG * load_IG
        score_IG -= remote_price * remote_IG
    cost_IG = 2
    if budget is not None:
        will_i_IG = pick(view.expert_KG) != budget.original_KG[:, view.hot][:, None]
        will_j_IG = view.expert_I[:, None] != pick(budget.original_KG)
        cost_IG = will_i_IG.astype(jnp.int32) + will_j_IG.astype(jnp.int32)
        was_IG = budget.changed_KG[:, view.hot][:, None] + pick(budget.changed_KG)
        cost_IG -= was_IG
        is_valid_IG &= cost_IG <= budget.left
    score_IG /= jnp.maximum(cost_IG, 1).astype(jnp.float32)
    is_parting_IG = view.to_part & (parts_IG + pick(parts_KG) > 0)
    score_IG += jnp.where(is_parting_IG, URGENT, 0.0)
    return jnp.where(is_valid_IG, score_IG, -jnp.inf), slot_IG


def score_copies(
    view: SearchFeatures,
    counts: Counts,
    homes: Homes | None,
    budget: Budget | None,
    remote_price: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What a copy of expert i over the least needed replica of device g is worth.

    Args:
      view: of `featurize`.
      counts: of `count`.
      homes: of `find_homes`, or None.
      budget: of `find_budget`, or None.
      remote_price: [] float32.

    Returns:
      score: [I, G] float32.
      slot: [G] int32, that replica.
    """
    used_1G, per_share_1G = view.used_G[None], view.per_share_G[None]
    one_more_I = counts.one_more_E[view.expert_I]
    kept_KG = used_1G + (one_more_I.max() - view.load_KG) * per_share_1G
    rise_KG = jnp.where(counts.is_free_KG, counts.harm_KG + phi(kept_KG), jnp.inf)
    slot_1G = jnp.argmin(rise_KG, axis=0, keepdims=True).astype(jnp.int32)

    def pick(value_KG: jax.Array) -> jax.Array:
        return jnp.take_along_axis(value_KG, slot_1G, axis=0)

    load_1G = pick(view.load_KG)
    phi_IG = phi(used_1G + (one_more_I[:, None] - load_1G) * per_share_1G)
    gain_IG = counts.relief_E[view.expert_I][:, None] - pick(counts.harm_KG)
    score_IG = (gain_IG + view.phi_G[None] - phi_IG) * view.scale
    is_valid_IG = pick(counts.is_free_KG) & (per_share_1G > 0) & (view.there_IG == 0)
    is_valid_IG &= view.is_filled_I[:, None]
    if homes is not None:
        made_IG = homes.made_E[view.expert_I][:, None]
        made_IG += homes.away_i_IG * one_more_I[:, None]
        score_IG -= remote_price * (made_IG + pick(homes.left_KG))
    if budget is not None:
        cost_IG = (view.expert_I[:, None] != pick(budget.original_KG)).astype(jnp.int32)
        cost_IG -= pick(budget.changed_KG)
        is_valid_IG &= cost_IG <= budget.left
    score_IG += jnp.where(view.is_missing, URGENT, 0.0)
    return jnp.where(is_valid_IG, score_IG, -jnp.inf), slot_1G[0]


def score_replacements(
    problem: PlacementProblem,
    view: SearchFeatures,
    counts: Counts,
    homes: Homes | None,
    budget: Budget | None,
    remote_price: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What another expert is worth in the slot that the hottest device needs least.

    Args:
      problem: what is to be placed, one layer.
      view: of `featurize`.
      counts: of `count`.
      homes: of `find_homes`, or None.
      budget: of `find_budget`, or None.
      remote_price: [] float32.

    Returns:
      score: [E] float32.
      slot: [] int32, that slot of the hottest device.
    """
    used_h, per_share_h = view.used_G[view.hot], view.per_share_G[view.hot]
    is_twin_I = view.twins_KG[:, view.hot] > 1
    left_I = counts.harm_KG[:, view.hot] + phi(used_h - view.load_I * per_share_h)
    left_I = jnp.where(view.to_part & ~is_twin_I, jnp.inf, left_I)
    left_I = jnp.where(
        counts.is_free_KG[:, view.hot] & view.is_filled_I, left_I, jnp.inf
    )
    slot = jnp.argmin(left_I).astype(jnp.int32)
    load = view.load_I[slot]

    phi_E = phi(used_h + (counts.one_more_E - load) * per_share_h)
    gain_E = counts.relief_E - counts.harm_KG[slot, view.hot]
    score_E = (gain_E + view.phi_G[view.hot] - phi_E) * view.scale
    expert_E = jnp.arange(score_E.shape[0], dtype=jnp.int32)
    is_here_E = (expert_E[:, None] == view.expert_I[None]).any(axis=1)
    is_valid_E = ~is_here_E & jnp.isfinite(left_I[slot]) & ~view.is_missing
    if homes is not None:
        is_away_E = (problem.home >= 0) & (problem.home != homes.hot_node)
        made_E = homes.made_E + jnp.where(is_away_E, counts.one_more_E, 0.0)
        score_E -= remote_price * (made_E + homes.left_KG[slot, view.hot])
    if budget is not None:
        cost_E = (expert_E != budget.original_KG[slot, view.hot]).astype(jnp.int32)
        cost_E -= budget.changed_KG[slot, view.hot]
        is_valid_E &= cost_E <= budget.left
    score_E += jnp.where(view.to_part, URGENT, 0.0)
    return jnp.where(is_valid_E, score_E, -jnp.inf), slot
