"""What each kind of move is worth: a swap, a copy, a replacement.

A score is the fall of the objective per physical expert that the move changes: -inf
where the move is not allowed, above `URGENT` where it repairs a defect.

Shape suffixes, for one layer: see `eplb_jax`; here also J physical experts of the
hottest device. Tables are [I, D]: the long axis is the minor one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.features import (
    URGENT,
    Budget,
    Effects,
    Homes,
    SearchFeatures,
    phi,
)
from eplb_jax.placement.problem import PlacementProblem

_NEVER = jnp.iinfo(jnp.int32).max
_NOT_PREFERRED = 1 << 30


def score_swaps(
    features: SearchFeatures,
    homes: Homes | None,
    budget: Budget | None,
    remote_price: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores swaps of each replica j of the hottest device with the best of device d.

    Args:
      features: from `featurize`.
      homes: from `find_homes`, or None.
      budget: from `find_budget`, or None.
      remote_price: [] float32.

    Returns:
      score: [J, D] float32.
      partner: [J, D] int32, the index of that best replica on its device.
    """
    per_device, num_devices = features.expert_ID.shape
    hot, replicas_here_ID = features.hot, features.replicas_here_ID
    per_share_hot = features.per_share_D[hot]
    used_hot, phi_hot = features.used_D[hot], features.phi_D[hot]
    # sum(phi) is convex in what a swap moves, and nearly symmetric about the amount
    # that makes both devices equally hot: of the replicas of device d, the one whose
    # swap comes nearest to that amount is the best. So phi is not needed I * J * D
    # times. The replica's index takes the low bits of the distance.
    ideal_D = (used_hot - features.used_D) / jnp.maximum(
        per_share_hot + features.per_share_D, 1e-9
    )
    moved_IJD = features.load_J[None, :, None] - features.load_ID[:, None]
    distance_IJD = jnp.abs(moved_IJD - ideal_D[None, None])
    index_bits = (per_device - 1).bit_length()
    index_I11 = jnp.arange(per_device, dtype=jnp.int32)[:, None, None]
    key_IJD = lax.bitcast_convert_type(distance_IJD, jnp.int32)
    key_IJD = (key_IJD >> index_bits << index_bits) | index_I11
    # Pairs of replicas on one device: how many a swap separates, less those it makes.
    same_IJD = features.expert_ID[:, None] == features.expert_J[None, :, None]
    is_on_hot_ID = same_IJD.any(axis=1)
    parts_JD = (replicas_here_ID[:, hot] > 1).astype(jnp.int32)[:, None]
    parts_JD -= (features.replicas_there_JD > 0).astype(jnp.int32)
    parts_ID = (replicas_here_ID > 1).astype(jnp.int32) - is_on_hot_ID.astype(jnp.int32)
    parts_IJD = parts_ID[:, None] + parts_JD[None]
    is_allowed_IJD = features.is_filled_ID[:, None] & (parts_IJD >= 0)
    if homes is not None:
        i_stays_ID = homes.is_last_ID & (homes.away_hot_ID > 0)
        j_stays_JD = homes.is_last_ID[:, hot][:, None] & (homes.away_there_JD > 0)
        is_allowed_IJD &= ~i_stays_ID[:, None] & ~j_stays_JD[None]
    is_not_preferred_IJD = features.to_separate & (parts_IJD <= 0)
    key_IJD = jnp.where(is_not_preferred_IJD, key_IJD | _NOT_PREFERRED, key_IJD)
    key_JD = jnp.where(is_allowed_IJD, key_IJD, _NEVER).min(axis=0)
    device_1D = jnp.arange(num_devices, dtype=jnp.int32)[None]
    is_valid_JD = (
        (key_JD != _NEVER) & (device_1D != hot) & features.is_filled_J[:, None]
    )
    is_valid_JD &= ~features.is_missing
    partner_JD = jnp.where(is_valid_JD, key_JD & ((1 << index_bits) - 1), 0)

    def pick(value_ID: jax.Array) -> jax.Array:
        return jnp.take_along_axis(value_ID, partner_JD, axis=0)

    load_JD = pick(features.load_ID)
    moved_JD = features.load_J[:, None] - load_JD
    gain_JD = phi_hot - phi(used_hot - moved_JD * per_share_hot)
    phi_JD = phi(features.used_D[None] + moved_JD * features.per_share_D[None])
    score_JD = (gain_JD + features.phi_D[None] - phi_JD) * features.scale
    if homes is not None:
        more_j_JD = homes.away_there_JD - homes.away_ID[:, hot][:, None]
        more_i_JD = pick(homes.away_hot_ID - homes.away_ID)
        remote_JD = more_j_JD * features.load_J[:, None] + more_i_JD * load_JD
        score_JD -= remote_price * remote_JD
    changes_JD = 2
    if budget is not None:
        new_j_JD = pick(features.expert_ID) != budget.original_ID[:, hot][:, None]
        new_i_JD = features.expert_J[:, None] != pick(budget.original_ID)
        changes_JD = new_j_JD.astype(jnp.int32) + new_i_JD.astype(jnp.int32)
        was_JD = budget.changed_ID[:, hot][:, None] + pick(budget.changed_ID)
        changes_JD -= was_JD
        is_valid_JD &= changes_JD <= budget.left
    score_JD /= jnp.maximum(changes_JD, 1).astype(jnp.float32)
    separates_JD = features.to_separate & (parts_JD + pick(parts_ID) > 0)
    score_JD += jnp.where(separates_JD, URGENT, 0.0)
    return jnp.where(is_valid_JD, score_JD, -jnp.inf), partner_JD


def score_copies(
    features: SearchFeatures,
    effects: Effects,
    homes: Homes | None,
    budget: Budget | None,
    remote_price: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores copies of each expert j over the least needed replica of device d.

    Args:
      features: from `featurize`.
      effects: from `find_effects`.
      homes: from `find_homes`, or None.
      budget: from `find_budget`, or None.
      remote_price: [] float32.

    Returns:
      score: [J, D] float32.
      overwritten: [D] int32, the index of that replica on its device.
    """
    used_1D, per_share_1D = features.used_D[None], features.per_share_D[None]
    one_more_J = effects.one_more_E[features.expert_J]
    kept_ID = used_1D + (one_more_J.max() - features.load_ID) * per_share_1D
    rise_ID = jnp.where(effects.is_free_ID, effects.harm_ID + phi(kept_ID), jnp.inf)
    overwritten_1D = jnp.argmin(rise_ID, axis=0, keepdims=True).astype(jnp.int32)

    def pick(value_ID: jax.Array) -> jax.Array:
        return jnp.take_along_axis(value_ID, overwritten_1D, axis=0)

    load_1D = pick(features.load_ID)
    phi_JD = phi(used_1D + (one_more_J[:, None] - load_1D) * per_share_1D)
    gain_JD = effects.relief_E[features.expert_J][:, None] - pick(effects.harm_ID)
    score_JD = (gain_JD + features.phi_D[None] - phi_JD) * features.scale
    is_valid_JD = pick(effects.is_free_ID) & (per_share_1D > 0)
    is_valid_JD &= features.replicas_there_JD == 0
    is_valid_JD &= features.is_filled_J[:, None]
    if homes is not None:
        remote_JD = homes.added_E[features.expert_J][:, None]
        remote_JD += homes.away_there_JD * one_more_J[:, None]
        score_JD -= remote_price * (remote_JD + pick(homes.removed_ID))
    if budget is not None:
        is_new_JD = features.expert_J[:, None] != pick(budget.original_ID)
        changes_JD = is_new_JD.astype(jnp.int32) - pick(budget.changed_ID)
        is_valid_JD &= changes_JD <= budget.left
    score_JD += jnp.where(features.is_missing, URGENT, 0.0)
    return jnp.where(is_valid_JD, score_JD, -jnp.inf), overwritten_1D[0]


def score_replacements(
    problem: PlacementProblem,
    features: SearchFeatures,
    effects: Effects,
    homes: Homes | None,
    budget: Budget | None,
    remote_price: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores each expert in place of the hottest device's least needed replica.

    Args:
      problem: of one layer.
      features: from `featurize`.
      effects: from `find_effects`.
      homes: from `find_homes`, or None.
      budget: from `find_budget`, or None.
      remote_price: [] float32.

    Returns:
      score: [E] float32.
      replaced: [] int32, the index of that replica on the hottest device.
    """
    hot = features.hot
    used_hot, per_share_hot = features.used_D[hot], features.per_share_D[hot]
    is_duplicate_J = features.replicas_here_ID[:, hot] > 1
    left_J = effects.harm_ID[:, hot] + phi(used_hot - features.load_J * per_share_hot)
    left_J = jnp.where(features.to_separate & ~is_duplicate_J, jnp.inf, left_J)
    left_J = jnp.where(
        effects.is_free_ID[:, hot] & features.is_filled_J, left_J, jnp.inf
    )
    replaced = jnp.argmin(left_J).astype(jnp.int32)
    load = features.load_J[replaced]

    phi_E = phi(used_hot + (effects.one_more_E - load) * per_share_hot)
    gain_E = effects.relief_E - effects.harm_ID[replaced, hot]
    score_E = (gain_E + features.phi_D[hot] - phi_E) * features.scale
    expert_E = jnp.arange(score_E.shape[0], dtype=jnp.int32)
    is_here_E = (expert_E[:, None] == features.expert_J[None]).any(axis=1)
    is_valid_E = ~is_here_E & jnp.isfinite(left_J[replaced]) & ~features.is_missing
    if homes is not None:
        is_away_E = (problem.home >= 0) & (problem.home != homes.hot_node)
        remote_E = homes.added_E + jnp.where(is_away_E, effects.one_more_E, 0.0)
        score_E -= remote_price * (remote_E + homes.removed_ID[replaced, hot])
    if budget is not None:
        is_new_E = expert_E != budget.original_ID[replaced, hot]
        changes_E = is_new_E.astype(jnp.int32) - budget.changed_ID[replaced, hot]
        is_valid_E &= changes_E <= budget.left
    score_E += jnp.where(features.to_separate, URGENT, 0.0)
    return jnp.where(is_valid_E, score_E, -jnp.inf), replaced
