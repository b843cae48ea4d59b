"""What a swap or a copy of a replica is worth: the two moves of `search`.

Shape suffixes, for one layer: E experts, S slots, G devices, K slots of a device,
I slots of the hottest device. Tables are [K, G]: the long axis is the minor one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_DOUBLINGS = 4
_POWER = 1 << _DOUBLINGS
# Above any difference of two objectives: what has to be mended before the balance.
URGENT = 1e3
_NEVER = jnp.iinfo(jnp.int32).max
_NOT_PREFERRED = 1 << 30


@dataclasses.dataclass(frozen=True)
class Rules:
    """Static settings of a search.

    Attributes:
      num_nodes: nodes that the devices are divided into, in order.
      has_homes: whether experts have a home node.
      has_budget: whether `Limits.max_moves` counts.
      separate: whether to part replicas of one expert on one device first.
    """

    num_nodes: int = 1
    has_homes: bool = False
    has_budget: bool = False
    separate: bool = True


class Limits(NamedTuple):
    """Settings of a search that may change without a new compilation.

    Attributes:
      max_steps: [] int32, steps at most.
      max_moves: [] int32, slots of a layer that may differ from the original.
      min_gain: [] float32, what a changed slot must at least lower the objective by.
      remote_price: [] float32, of load served away from home.
    """

    max_steps: jax.Array
    max_moves: jax.Array
    min_gain: jax.Array
    remote_price: jax.Array


class Problem(NamedTuple):
    """What is to be placed; every leaf has a leading axis of layers.

    Attributes:
      weight: [experts] float32 loads, of sum 1.
      per_share: [num_gpus] float32, 1 / a device's share of the capacity; 0 if dead.
      home: [experts] int32, home node of an expert, or -1.
      original: [slots] int32, what `max_moves` counts from.
    """

    weight: jax.Array
    per_share: jax.Array
    home: jax.Array
    original: jax.Array


class Placed(NamedTuple):
    """State of the search: like `Problem`, one layer each."""

    expert_S: jax.Array
    count_E: jax.Array
    is_parted: jax.Array
    is_done: jax.Array
    best_S: jax.Array  # of all placements seen, by their true peak
    best_cost: jax.Array


class View(NamedTuple):
    """What the two kinds of moves have in common, in one step of one layer."""

    expert_KG: jax.Array
    is_filled_KG: jax.Array
    load_KG: jax.Array  # of the replica in the slot
    twins_KG: jax.Array  # replicas of the slot's expert on the same device
    per_share_G: jax.Array  # scaled so that the hottest device is at 1
    used_G: jax.Array
    phi_G: jax.Array
    hot: jax.Array
    peak: jax.Array  # use of the hottest device, 1 being its fair share
    num_twins: jax.Array  # slots that repeat an expert of their device
    num_missing: jax.Array
    expert_I: jax.Array  # of the hottest device; or an expert without a replica
    load_I: jax.Array
    is_filled_I: jax.Array
    there_IG: jax.Array  # replicas of expert i on device g
    scale: jax.Array  # from a change of sum(phi) to one of the objective
    is_missing: jax.Array
    to_part: jax.Array


class Homes(NamedTuple):
    """Where replicas stand to their experts' homes; `away` is 1.0 or 0.0."""

    away_KG: jax.Array
    is_last_KG: jax.Array  # the only replica on its expert's home node
    away_i_IG: jax.Array  # expert i, if it were on device g
    away_j_KG: jax.Array  # the slot's expert, if it were on the hottest device
    away_count_E: jax.Array


def look(problem: Problem, placed: Placed) -> View:
    """The loads as they are, and the device that the next move is for.

    That is the hottest one, unless replicas on one device are to be parted; and the
    expert to copy is one of its own, unless another has no replica at all.

    Args:
      problem: what is to be placed, one layer.
      placed: where it is now.

    Returns:
      A `View`.
    """
    num_gpus = problem.per_share.shape[0]
    expert_KG = placed.expert_S.reshape(num_gpus, -1).T
    is_filled_KG = expert_KG >= 0
    load_E = problem.weight / jnp.maximum(placed.count_E, 1).astype(jnp.float32)
    load_KG = jnp.where(is_filled_KG, load_E[expert_KG], 0.0)
    load_G = load_KG.sum(axis=0)
    hottest = jnp.max(load_G * problem.per_share)
    per_share_G = problem.per_share / jnp.maximum(hottest, 1e-30)
    used_G = load_G * per_share_G
    phi_G = _phi(used_G)
    is_twin_KKG = (expert_KG[:, None] == expert_KG[None]) & is_filled_KG[None]
    twins_KG = is_twin_KKG.sum(axis=0, dtype=jnp.int32)

    has_twins_G = (twins_KG > 1).any(axis=0)
    is_missing_E = placed.count_E == 0
    num_missing = is_missing_E.sum(dtype=jnp.int32)
    is_missing = num_missing > 0
    to_part = has_twins_G.any() & ~placed.is_parted & ~is_missing
    hot = jnp.argmax(jnp.where(to_part, has_twins_G.astype(jnp.float32), used_G))
    lost = jnp.argmax(jnp.where(is_missing_E, problem.weight, -1.0)).astype(jnp.int32)
    expert_I = jnp.where(is_missing, lost, expert_KG[:, hot])
    same_KIG = expert_KG[:, None] == expert_I[None, :, None]
    return View(
        expert_KG=expert_KG,
        is_filled_KG=is_filled_KG,
        load_KG=load_KG,
        twins_KG=twins_KG,
        per_share_G=per_share_G,
        used_G=used_G,
        phi_G=phi_G,
        hot=hot.astype(jnp.int32),
        peak=hottest,
        num_twins=(twins_KG > 1).sum(dtype=jnp.int32),
        num_missing=num_missing,
        expert_I=expert_I,
        load_I=jnp.where(is_missing, 0.0, load_KG[:, hot]),
        is_filled_I=expert_I >= 0,
        there_IG=same_KIG.sum(axis=0, dtype=jnp.int32),
        scale=1.0 / (_POWER * phi_G.sum()),
        is_missing=is_missing,
        to_part=to_part,
    )


def find_homes(problem: Problem, placed: Placed, view: View, rules: Rules) -> Homes:
    """Which replicas are away from home, and which must not go.

    Args:
      problem: what is to be placed, one layer.
      placed: where it is now.
      view: of `look`.
      rules: settings.

    Returns:
      A `Homes`.
    """
    num_gpus = problem.per_share.shape[0]
    node_G = jnp.arange(num_gpus, dtype=jnp.int32) // (num_gpus // rules.num_nodes)
    home_KG = jnp.where(view.is_filled_KG, problem.home[view.expert_KG], -1)
    has_home_KG = home_KG >= 0
    is_away_KG = has_home_KG & (home_KG != node_G[None])
    is_home_KG = (view.is_filled_KG & ~is_away_KG).astype(jnp.int32)
    home_count_E = jnp.zeros_like(placed.count_E).at[view.expert_KG].add(is_home_KG)
    is_only_KG = home_count_E[view.expert_KG] == 1
    home_I1 = problem.home[view.expert_I][:, None]
    is_away_i_IG = (home_I1 >= 0) & (home_I1 != node_G[None])
    is_away_j_KG = has_home_KG & (home_KG != node_G[view.hot])
    return Homes(
        away_KG=is_away_KG.astype(jnp.float32),
        is_last_KG=has_home_KG & ~is_away_KG & is_only_KG,
        away_i_IG=is_away_i_IG.astype(jnp.float32),
        away_j_KG=is_away_j_KG.astype(jnp.float32),
        away_count_E=(placed.count_E - home_count_E).astype(jnp.float32),
    )


def score_swaps(
    problem: Problem, view: View, homes: Homes | None, rules: Rules, limits: Limits
) -> tuple[jax.Array, jax.Array]:
    """What a swap of replica i with the best one of device g is worth per slot.

    Args:
      problem: what is to be placed, one layer.
      view: of `look`.
      homes: of `find_homes`, or None.
      rules: static settings.
      limits: further settings.

    Returns:
      score: [I, G] float32, -inf where there is none.
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
    if rules.separate:
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
    gain_IG = phi_h - _phi(used_h - moved_IG * per_share_h)
    phi_IG = _phi(view.used_G[None] + moved_IG * view.per_share_G[None])
    score_IG = (gain_IG + view.phi_G[None] - phi_IG) * view.scale
    if homes is not None:
        more_i_IG = homes.away_i_IG - homes.away_KG[:, view.hot][:, None]
        more_j_IG = pick(homes.away_j_KG - homes.away_KG)
        remote_IG = more_i_IG * view.load_I[:, None] + more_j_IG * load_IG
        score_IG -= limits.remote_price * remote_IG
    cost_IG = 2
    if rules.has_budget:
        original_KG = problem.original.reshape(num_gpus, -1).T
        changed_KG = (view.expert_KG != original_KG).astype(jnp.int32)
        will_i_IG = pick(view.expert_KG) != original_KG[:, view.hot][:, None]
        will_j_IG = view.expert_I[:, None] != pick(original_KG)
        cost_IG = will_i_IG.astype(jnp.int32) + will_j_IG.astype(jnp.int32)
        cost_IG -= changed_KG[:, view.hot][:, None] + pick(changed_KG)
        is_valid_IG &= changed_KG.sum() + cost_IG <= limits.max_moves
    score_IG /= jnp.maximum(cost_IG, 1).astype(jnp.float32)
    if rules.separate:
        is_parting_IG = view.to_part & (parts_IG + pick(parts_KG) > 0)
        score_IG += jnp.where(is_parting_IG, URGENT, 0.0)
    return jnp.where(is_valid_IG, score_IG, -jnp.inf), slot_IG


def score_copies(
    problem: Problem,
    placed: Placed,
    view: View,
    homes: Homes | None,
    rules: Rules,
    limits: Limits,
) -> tuple[jax.Array, jax.Array]:
    """What a copy of expert i over the least needed replica of device g is worth.

    Args:
      problem: what is to be placed, one layer.
      placed: where it is now.
      view: of `look`.
      homes: of `find_homes`, or None.
      rules: static settings.
      limits: further settings.

    Returns:
      score: [I, G] float32 per slot, -inf where there is none.
      slot: [G] int32, that replica.
    """
    num_gpus = view.expert_KG.shape[1]
    count_E = placed.count_E.astype(jnp.float32)
    one_less_KG = (problem.weight / jnp.maximum(count_E - 1, 1))[view.expert_KG]
    one_more_I = (problem.weight / (count_E + 1))[view.expert_I]
    used_1G, per_share_1G = view.used_G[None], view.per_share_G[None]
    # The other replicas of an overwritten expert grow, those of a copied one shrink.
    # Both sums go device by device, as if no device held both experts.
    grown_KG = used_1G + (one_less_KG - view.load_KG) * per_share_1G
    harm_KG = jnp.where(view.is_filled_KG, _phi(grown_KG) - view.phi_G[None], 0.0)
    harm_E = jnp.zeros_like(count_E).at[view.expert_KG].add(harm_KG)
    harm_KG = jnp.where(view.is_filled_KG, harm_E[view.expert_KG] - harm_KG, 0.0)
    shrinks_I1 = (view.load_I - one_more_I)[:, None]
    shrinks_IG = view.there_IG.astype(jnp.float32) * shrinks_I1
    relief_IG = view.phi_G[None] - _phi(used_1G - shrinks_IG * per_share_1G)
    relief_I1 = relief_IG.sum(axis=1, keepdims=True)

    is_free_KG = ~view.is_filled_KG | (placed.count_E[view.expert_KG] > 1)
    if homes is not None:
        is_free_KG &= ~homes.is_last_KG
    kept_KG = used_1G + (one_more_I.max() - view.load_KG) * per_share_1G
    cost_KG = jnp.where(is_free_KG, harm_KG + _phi(kept_KG), jnp.inf)
    slot_1G = jnp.argmin(cost_KG, axis=0, keepdims=True).astype(jnp.int32)

    def pick(value_KG: jax.Array) -> jax.Array:
        return jnp.take_along_axis(value_KG, slot_1G, axis=0)

    load_1G = pick(view.load_KG)
    phi_IG = _phi(used_1G + (one_more_I[:, None] - load_1G) * per_share_1G)
    score_IG = (relief_I1 - pick(harm_KG) + view.phi_G[None] - phi_IG) * view.scale
    is_valid_IG = pick(is_free_KG) & (per_share_1G > 0) & (view.there_IG == 0)
    is_valid_IG &= view.is_filled_I[:, None]
    if homes is not None:
        away_1G = homes.away_count_E[pick(view.expert_KG)]
        away_I1 = homes.away_count_E[view.expert_I][:, None]
        left_1G = (away_1G - pick(homes.away_KG)) * pick(one_less_KG)
        made_IG = (away_I1 + homes.away_i_IG) * one_more_I[:, None]
        made_IG -= away_I1 * view.load_I[:, None]
        remote_IG = left_1G - away_1G * load_1G + made_IG
        score_IG -= limits.remote_price * remote_IG
    if rules.has_budget:
        original_KG = problem.original.reshape(num_gpus, -1).T
        changed_KG = (view.expert_KG != original_KG).astype(jnp.int32)
        cost_IG = (view.expert_I[:, None] != pick(original_KG)).astype(jnp.int32)
        cost_IG -= pick(changed_KG)
        is_valid_IG &= changed_KG.sum() + cost_IG <= limits.max_moves
    score_IG += jnp.where(view.is_missing, URGENT, 0.0)
    return jnp.where(is_valid_IG, score_IG, -jnp.inf), slot_1G[0]


def _phi(used: jax.Array) -> jax.Array:
    for _ in range(_DOUBLINGS):
        used = used * used
    return used
