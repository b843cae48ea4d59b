"""What a search knows of a placement before each move: loads, twins, homes.

Shape suffixes, for one layer: E experts, S slots, G devices, K slots of a device,
I slots of the hottest device. Tables are [K, G]: the long axis is the minor one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

_DOUBLINGS = 4
POWER = 1 << _DOUBLINGS
# Above any difference of two objectives: what has to be mended before the balance.
URGENT = 1e3


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


class PlacementProblem(NamedTuple):
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


class SearchState(NamedTuple):
    """State of the search: like `PlacementProblem`, one layer each."""

    expert_S: jax.Array
    count_E: jax.Array
    is_parted: jax.Array
    is_done: jax.Array
    best_S: jax.Array  # of all placements seen, by their true peak
    best_cost: jax.Array


class SearchFeatures(NamedTuple):
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
    hot_node: jax.Array
    # Change of the load away from home,
    left_KG: jax.Array  # if this replica were not
    made_E: jax.Array  # if there were one more of the expert, at home


class Counts(NamedTuple):
    """What one replica more or less of an expert does to all devices but its own."""

    one_more_E: jax.Array  # load of a replica if there were one more
    relief_E: jax.Array  # fall of sum(phi) where the expert is, if so
    harm_KG: jax.Array  # rise of sum(phi) elsewhere if this replica were not
    is_free_KG: jax.Array  # whether the slot may lose its replica


class Budget(NamedTuple):
    """Slots that hold another expert than they did; for `Rules.has_budget`."""

    original_KG: jax.Array
    changed_KG: jax.Array
    left: jax.Array


def featurize(problem: PlacementProblem, placed: SearchState) -> SearchFeatures:
    """The loads as they are, and the device that the next move is for.

    That is the hottest one, unless replicas on one device are to be parted; and the
    expert to copy is one of its own, unless another has no replica at all.

    Args:
      problem: what is to be placed, one layer.
      placed: where it is now.

    Returns:
      A `SearchFeatures`.
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
    phi_G = phi(used_G)
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
    return SearchFeatures(
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
        scale=1.0 / (POWER * phi_G.sum()),
        is_missing=is_missing,
        to_part=to_part,
    )


def find_homes(
    problem: PlacementProblem, placed: SearchState, view: SearchFeatures, rules: Rules
) -> Homes:
    """Which replicas are away from home, and which must not go.

    Args:
      problem: what is to be placed, one layer.
      placed: where it is now.
      view: of `featurize`.
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
    away_count_E = (placed.count_E - home_count_E).astype(jnp.float32)
    count_E = placed.count_E.astype(jnp.float32)
    load_E = problem.weight / jnp.maximum(count_E, 1)
    one_less_KG = (problem.weight / jnp.maximum(count_E - 1, 1))[view.expert_KG]
    away_count_KG = away_count_E[view.expert_KG]
    left_KG = (away_count_KG - is_away_KG.astype(jnp.float32)) * one_less_KG
    left_KG -= away_count_KG * view.load_KG
    home_I1 = problem.home[view.expert_I][:, None]
    is_away_i_IG = (home_I1 >= 0) & (home_I1 != node_G[None])
    is_away_j_KG = has_home_KG & (home_KG != node_G[view.hot])
    return Homes(
        away_KG=is_away_KG.astype(jnp.float32),
        is_last_KG=has_home_KG & ~is_away_KG & is_only_KG,
        away_i_IG=is_away_i_IG.astype(jnp.float32),
        away_j_KG=is_away_j_KG.astype(jnp.float32),
        hot_node=node_G[view.hot],
        left_KG=jnp.where(view.is_filled_KG, left_KG, 0.0),
        made_E=away_count_E * (problem.weight / (count_E + 1) - load_E),
    )


def count(
    problem: PlacementProblem,
    placed: SearchState,
    view: SearchFeatures,
    homes: Homes | None,
) -> Counts:
    """What another number of replicas would do.

    Both sums go replica by replica, as if no two of the replicas concerned were on
    one device.

    Args:
      problem: what is to be placed, one layer.
      placed: where it is now.
      view: of `featurize`.
      homes: of `find_homes`, or None.

    Returns:
      A `Counts`.
    """
    count_E = placed.count_E.astype(jnp.float32)
    one_more_E = problem.weight / (count_E + 1)
    one_less_E = problem.weight / jnp.maximum(count_E - 1, 1)
    used_1G, per_share_1G = view.used_G[None], view.per_share_G[None]

    def change(load_E: jax.Array) -> jax.Array:
        """Rise of phi on the slot's device, if its replica had another load."""
        more_KG = load_E[view.expert_KG] - view.load_KG
        rise_KG = phi(used_1G + more_KG * per_share_1G) - view.phi_G[None]
        return jnp.where(view.is_filled_KG, rise_KG, 0.0)

    zeros_E = jnp.zeros_like(count_E)
    rise_KG = change(one_less_E)
    rise_E = zeros_E.at[view.expert_KG].add(rise_KG)
    harm_KG = jnp.where(view.is_filled_KG, rise_E[view.expert_KG] - rise_KG, 0.0)
    is_free_KG = ~view.is_filled_KG | (placed.count_E[view.expert_KG] > 1)
    if homes is not None:
        is_free_KG &= ~homes.is_last_KG
    relief_E = zeros_E.at[view.expert_KG].add(-change(one_more_E))
    return Counts(one_more_E, relief_E, harm_KG, is_free_KG)


def find_budget(
    problem: PlacementProblem, view: SearchFeatures, limits: Limits
) -> Budget:
    """What may still change.

    Args:
      problem: what is to be placed, one layer.
      view: of `featurize`.
      limits: settings.

    Returns:
      A `Budget`.
    """
    num_gpus = view.expert_KG.shape[1]
    original_KG = problem.original.reshape(num_gpus, -1).T
    changed_KG = (view.expert_KG != original_KG).astype(jnp.int32)
    return Budget(original_KG, changed_KG, limits.max_moves - changed_KG.sum())


def phi(used: jax.Array) -> jax.Array:
    """used^16: its sum over the devices is the 16th power of the smoothed peak.

    Args:
      used: [...] float32.

    Returns:
      [...] float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(phi(jnp.float32(2)))
      65536.0
    """
    for _ in range(_DOUBLINGS):
        used = used * used
    return used
