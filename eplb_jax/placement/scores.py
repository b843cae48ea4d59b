"""What each kind of move is worth: a swap, a copy, a replacement.

A score is the fall of the objective per physical expert that the move changes: -inf
where the move is not allowed, above `URGENT` where it repairs a defect. It depends on
the present placement only, not on what has moved before: so a search with a small
budget makes the first moves of one with a large budget, and the next search goes on.
Without homes, a move that repairs nothing makes no device as hot as the hottest: so
every placement on the way has a peak that is no higher than the one before.

Shape suffixes, for one layer: see `eplb_jax`; here also J physical experts of the
hottest device. Tables are [I, D]: the long axis is the minor one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.features import (
    COOLER,
    URGENT,
    Effects,
    Homes,
    SearchFeatures,
    phi,
)
from eplb_jax.placement.problem import PlacementProblem

_NEVER = jnp.iinfo(jnp.int32).max
_NOT_PREFERRED = 1 << 30


def score_swaps(
    features: SearchFeatures, homes: Homes | None, remote_price: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores swaps of each replica j of the hottest device with the best of device d.

    Args:
      features: from `featurize`.
      homes: from `find_homes`, or None.
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
    hot_JD = used_hot - moved_JD * per_share_hot
    used_JD = features.used_D[None] + moved_JD * features.per_share_D[None]
    gain_JD = phi_hot - phi(hot_JD)
    score_JD = (gain_JD + features.phi_D[None] - phi(used_JD)) * features.scale
    if homes is None:
        is_cooler_JD = (hot_JD < COOLER) & (used_JD < COOLER)
        is_valid_JD &= is_cooler_JD | features.to_separate
    else:
        more_j_JD = homes.away_there_JD - homes.away_ID[:, hot][:, None]
        more_i_JD = pick(homes.away_hot_ID - homes.away_ID)
        remote_JD = more_j_JD * features.load_J[:, None] + more_i_JD * load_JD
        score_JD -= remote_price * remote_JD
    score_JD /= 2.0  # physical experts that a swap changes
    separates_JD = features.to_separate & (parts_JD + pick(parts_ID) > 0)
    score_JD += jnp.where(separates_JD, URGENT, 0.0)
    return jnp.where(is_valid_JD, score_JD, -jnp.inf), partner_JD


def score_copies(
    features: SearchFeatures,
    effects: Effects,
    homes: Homes | None,
    remote_price: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores copies of each expert j over the least needed replica of device d.

    Args:
      features: from `featurize`.
      effects: from `find_effects`.
      homes: from `find_homes`, or None.
      remote_price: [] float32.

    Returns:
      score: [J, D] float32.
      overwritten: [D] int32, the index of that replica on its device.
    """
    used_1D, per_share_1D = features.used_D[None], features.per_share_D[None]
    one_more_J = effects.one_more_E[features.expert_J]
    kept_ID = used_1D + (one_more_J.max() - effects.freed_ID) * per_share_1D
    is_free_ID = effects.is_free_ID
    if homes is None:
        is_free_ID &= effects.is_cooler_ID | features.is_missing
    rise_ID = jnp.where(is_free_ID, effects.harm_ID + phi(kept_ID), jnp.inf)
    overwritten_1D = jnp.argmin(rise_ID, axis=0, keepdims=True).astype(jnp.int32)

    def pick(value_ID: jax.Array) -> jax.Array:
        return jnp.take_along_axis(value_ID, overwritten_1D, axis=0)

    freed_1D = pick(effects.freed_ID)
    used_JD = used_1D + (one_more_J[:, None] - freed_1D) * per_share_1D
    gain_JD = effects.relief_E[features.expert_J][:, None] - pick(effects.harm_ID)
    score_JD = (gain_JD + features.phi_D[None] - phi(used_JD)) * features.scale
    may_gain_J = features.is_filled_J & effects.may_gain_E[features.expert_J]
    is_valid_JD = pick(is_free_ID) & (per_share_1D > 0)
    is_valid_JD &= (features.replicas_there_JD == 0) & may_gain_J[:, None]
    if homes is None:
        # The hottest device counts most, and may have both experts: phi of the sum.
        more_1D, less_J1 = _changes_of_hottest(features, effects, pick, one_more_J)
        used_hot = features.used_D[features.hot]
        hot_JD = used_hot + more_1D - less_J1
        apart_JD = phi(used_hot + more_1D) + phi(used_hot - less_J1) - phi(used_hot)
        excess_JD = jnp.where(more_1D > 0, apart_JD - phi(hot_JD), 0.0)
        score_JD += excess_JD * features.scale
        is_cooler_JD = (hot_JD < COOLER) & (used_JD < COOLER)
        is_valid_JD &= is_cooler_JD | features.is_missing
    else:
        remote_JD = homes.added_E[features.expert_J][:, None]
        remote_JD += homes.away_there_JD * one_more_J[:, None]
        score_JD -= remote_price * (remote_JD + pick(homes.removed_ID))
    score_JD += jnp.where(features.is_missing, URGENT, 0.0)
    return jnp.where(is_valid_JD, score_JD, -jnp.inf), overwritten_1D[0]


def _changes_of_hottest(
    features: SearchFeatures,
    effects: Effects,
    pick: Callable[[jax.Array], jax.Array],
    one_more_J: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns what copies change in the use of the hottest device.

    Args:
      features: from `featurize`.
      effects: from `find_effects`.
      pick: selects from [I, D] what belongs to the replica overwritten on each device.
      one_more_J: load of each replica of expert j if there were one more.

    Returns:
      more: [1, D], the rise by what is overwritten, if the hottest device has it, too.
      less: [J, 1], the fall by what is copied.
    """
    hot = features.hot
    per_share_hot = features.per_share_D[hot]
    is_both_JD = pick(features.expert_ID) == features.expert_J[:, None]
    both_1D = is_both_JD.sum(axis=0, keepdims=True).astype(jnp.float32)
    here_J = features.replicas_here_ID[:, hot].astype(jnp.float32)
    less_J = (features.load_J - one_more_J) * here_J * per_share_hot
    return both_1D * pick(effects.more_ID) * per_share_hot, less_J[:, None]


def score_replacements(
    problem: PlacementProblem,
    features: SearchFeatures,
    effects: Effects,
    homes: Homes | None,
    remote_price: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores each expert in place of the hottest device's least needed replica.

    Where empty physical experts are to be filled, the device is the coolest that has
    one, and the expert fills it.

    Args:
      problem: of one layer.
      features: from `featurize`.
      effects: from `find_effects`.
      homes: from `find_homes`, or None.
      remote_price: [] float32.

    Returns:
      score: [E] float32.
      replaced: [] int32, the index of that replica on the hottest device.
    """
    hot = features.hot
    used_hot, per_share_hot = features.used_D[hot], features.per_share_D[hot]
    to_separate, to_fill = features.to_separate, features.to_fill
    is_duplicate_J = features.replicas_here_ID[:, hot] > 1
    freed_J = effects.freed_ID[:, hot]
    left_J = effects.harm_ID[:, hot] + phi(used_hot - freed_J * per_share_hot)
    is_free_J = effects.is_free_ID[:, hot] & (is_duplicate_J | ~to_separate)
    if homes is None:
        is_free_J &= effects.is_cooler_ID[:, hot] | to_separate
    is_free_J &= jnp.where(to_fill, ~features.is_filled_J, features.is_filled_J)
    left_J = jnp.where(is_free_J, left_J, jnp.inf)
    replaced = jnp.argmin(left_J).astype(jnp.int32)

    used_E = used_hot + (effects.one_more_E - freed_J[replaced]) * per_share_hot
    gain_E = effects.relief_E - effects.harm_ID[replaced, hot]
    score_E = (gain_E + features.phi_D[hot] - phi(used_E)) * features.scale
    expert_E = jnp.arange(score_E.shape[0], dtype=jnp.int32)
    is_here_E = (expert_E[:, None] == features.expert_J[None]).any(axis=1)
    is_valid_E = ~is_here_E & jnp.isfinite(left_J[replaced]) & ~features.is_missing
    is_valid_E &= effects.may_gain_E
    if homes is None:
        is_valid_E &= (used_E < COOLER) | to_separate
    else:
        is_away_E = (problem.home >= 0) & (problem.home != homes.hot_node)
        remote_E = homes.added_E + jnp.where(is_away_E, effects.one_more_E, 0.0)
        score_E -= remote_price * (remote_E + homes.removed_ID[replaced, hot])
    # A replica more helps later, if not now; but not away from home.
    is_welcome_E = jnp.bool_(True) if homes is None else score_E > 0
    score_E += jnp.where(to_separate | (to_fill & is_welcome_E), URGENT, 0.0)
    return jnp.where(is_valid_E, score_E, -jnp.inf), replaced
