"""What the search computes before each move: loads, duplicates, homes, effects.

Shape suffixes, for one layer: see `eplb_jax`; here also J physical experts of the
hottest device. Tables are [I, D]: the long axis is the minor one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eplb_jax.placement.problem import PlacementProblem, Rules, SearchState

_DOUBLINGS = 4
POWER = 1 << _DOUBLINGS
# Above any difference of two objectives: for defects to repair before balancing.
URGENT = 1e3
# A move that cools the hottest device makes no other as hot; less a rounding of sums.
COOLER = 1 - 1e-6


class SearchFeatures(NamedTuple):
    """What all kinds of moves need, in one step of one layer."""

    expert_ID: jax.Array
    is_filled_ID: jax.Array
    load_ID: jax.Array  # of the replica
    replicas_here_ID: jax.Array  # of its expert, on the same device
    per_share_D: jax.Array  # scaled so that the hottest device is at 1, or would be
    used_D: jax.Array
    phi_D: jax.Array
    hot: jax.Array  # the device that the next move is for
    peak: jax.Array  # use of the hottest device, 1 being its fair share
    num_duplicates: jax.Array  # replicas that share their device with another
    num_missing: jax.Array  # experts without a replica
    num_vacant: jax.Array  # empty physical experts of devices alive
    expert_J: jax.Array  # of the hottest device; or an expert without a replica
    load_J: jax.Array
    is_filled_J: jax.Array
    replicas_there_JD: jax.Array  # of expert j, on device d
    scale: jax.Array  # from a change of sum(phi) to one of the objective
    is_missing: jax.Array
    to_separate: jax.Array
    to_fill: jax.Array


class Homes(NamedTuple):
    """Replicas in relation to their experts' homes; `away` is 1.0 or 0.0."""

    away_ID: jax.Array
    is_last_ID: jax.Array  # the only replica on its expert's home node
    away_there_JD: jax.Array  # expert j, if it were on device d
    away_hot_ID: jax.Array  # the replica's expert, if it were on the hottest device
    hot_node: jax.Array
    # Change of the load away from home,
    removed_ID: jax.Array  # if this replica were removed
    added_E: jax.Array  # if the expert had one more, at home


class Effects(NamedTuple):
    """Effects of one replica more or less of an expert on the other devices."""

    one_more_E: jax.Array  # load of each replica if there were one more
    relief_E: jax.Array  # fall of sum(phi) where the expert is, if so
    may_gain_E: jax.Array  # whether there may be one more
    harm_ID: jax.Array  # rise of sum(phi) elsewhere if this replica were removed
    more_ID: jax.Array  # rise of the load of each other replica, if so
    freed_ID: jax.Array  # fall of its device's load, if so
    is_free_ID: jax.Array  # whether the replica may be removed
    is_cooler_ID: jax.Array  # whether no device becomes as hot as the hottest, if so


def featurize(problem: PlacementProblem, state: SearchState) -> SearchFeatures:
    """Computes the loads, and picks the device that the next move is for.

    That is the hottest one, unless replicas on one device are to be separated, or empty
    physical experts to be filled. The expert to copy is one of that device, unless
    another has no replica at all.

    Args:
      problem: of one layer.
      state: where it is now.

    Returns:
      A `SearchFeatures`.
    """
    num_devices = problem.per_share.shape[0]
    expert_ID = state.expert_S.reshape(num_devices, -1).T
    is_filled_ID = expert_ID >= 0
    load_E = problem.weight / jnp.maximum(state.count_E, 1).astype(jnp.float32)
    load_ID = jnp.where(is_filled_ID, load_E[expert_ID], 0.0)
    load_D = load_ID.sum(axis=0)
    peak = jnp.max(load_D * problem.per_share)
    is_missing_E = state.count_E == 0
    num_missing = is_missing_E.sum(dtype=jnp.int32)
    is_missing = num_missing > 0
    lost = jnp.argmax(jnp.where(is_missing_E, problem.weight, -1.0)).astype(jnp.int32)
    # An expert without a replica may be heavier than all that any device has.
    lost_peak = problem.weight[lost] * problem.per_share.max()
    highest = jnp.where(is_missing, jnp.maximum(peak, lost_peak), peak)
    per_share_D = problem.per_share / jnp.maximum(highest, 1e-30)
    used_D = load_D * per_share_D
    phi_D = phi(used_D)
    is_same_IID = (expert_ID[:, None] == expert_ID[None]) & is_filled_ID[None]
    replicas_here_ID = is_same_IID.sum(axis=0, dtype=jnp.int32)

    has_duplicates_D = (replicas_here_ID > 1).any(axis=0)
    to_separate = has_duplicates_D.any() & ~state.is_separated & ~is_missing
    is_vacant_ID = ~is_filled_ID & (problem.per_share > 0)[None]
    has_room_D = is_vacant_ID.any(axis=0)
    to_fill = has_room_D.any() & ~state.is_filled & ~is_missing & ~to_separate
    urgency_D = jnp.where(to_separate, has_duplicates_D.astype(jnp.float32), used_D)
    coolness_D = jnp.where(has_room_D, -used_D, -jnp.inf)
    hot = jnp.argmax(jnp.where(to_fill, coolness_D, urgency_D))
    expert_J = jnp.where(is_missing, lost, expert_ID[:, hot])
    same_IJD = expert_ID[:, None] == expert_J[None, :, None]
    return SearchFeatures(
        expert_ID=expert_ID,
        is_filled_ID=is_filled_ID,
        load_ID=load_ID,
        replicas_here_ID=replicas_here_ID,
        per_share_D=per_share_D,
        used_D=used_D,
        phi_D=phi_D,
        hot=hot.astype(jnp.int32),
        peak=peak,
        num_duplicates=(replicas_here_ID > 1).sum(dtype=jnp.int32),
        num_missing=num_missing,
        num_vacant=is_vacant_ID.sum(dtype=jnp.int32),
        expert_J=expert_J,
        load_J=jnp.where(is_missing, 0.0, load_ID[:, hot]),
        is_filled_J=expert_J >= 0,
        replicas_there_JD=same_IJD.sum(axis=0, dtype=jnp.int32),
        scale=1.0 / (POWER * jnp.maximum(phi_D.sum(), 0.5)),
        is_missing=is_missing,
        to_separate=to_separate,
        to_fill=to_fill,
    )


def find_homes(
    problem: PlacementProblem,
    state: SearchState,
    features: SearchFeatures,
    rules: Rules,
) -> Homes:
    """Finds the replicas that are away from home, and those that must stay.

    Args:
      problem: of one layer.
      state: where it is now.
      features: from `featurize`.
      rules: settings.

    Returns:
      A `Homes`.
    """
    expert_ID, is_filled_ID = features.expert_ID, features.is_filled_ID
    num_devices = problem.per_share.shape[0]
    node_D = jnp.arange(num_devices, dtype=jnp.int32) // (
        num_devices // rules.num_nodes
    )
    home_ID = jnp.where(is_filled_ID, problem.home[expert_ID], -1)
    has_home_ID = home_ID >= 0
    is_away_ID = has_home_ID & (home_ID != node_D[None])
    is_home_ID = (is_filled_ID & ~is_away_ID).astype(jnp.int32)
    home_count_E = jnp.zeros_like(state.count_E).at[expert_ID].add(is_home_ID)
    is_only_ID = home_count_E[expert_ID] == 1
    away_count_E = (state.count_E - home_count_E).astype(jnp.float32)
    count_E = state.count_E.astype(jnp.float32)
    load_E = problem.weight / jnp.maximum(count_E, 1)
    one_less_ID = (problem.weight / jnp.maximum(count_E - 1, 1))[expert_ID]
    away_count_ID = away_count_E[expert_ID]
    removed_ID = (away_count_ID - is_away_ID.astype(jnp.float32)) * one_less_ID
    removed_ID -= away_count_ID * features.load_ID
    home_J1 = problem.home[features.expert_J][:, None]
    is_away_there_JD = (home_J1 >= 0) & (home_J1 != node_D[None])
    is_away_hot_ID = has_home_ID & (home_ID != node_D[features.hot])
    return Homes(
        away_ID=is_away_ID.astype(jnp.float32),
        is_last_ID=has_home_ID & ~is_away_ID & is_only_ID,
        away_there_JD=is_away_there_JD.astype(jnp.float32),
        away_hot_ID=is_away_hot_ID.astype(jnp.float32),
        hot_node=node_D[features.hot],
        removed_ID=jnp.where(is_filled_ID, removed_ID, 0.0),
        added_E=away_count_E * (problem.weight / (count_E + 1) - load_E),
    )


def find_effects(
    problem: PlacementProblem,
    state: SearchState,
    features: SearchFeatures,
    homes: Homes | None,
    max_replicas: jax.Array,
) -> Effects:
    """Finds what one replica more or less of each expert would do.

    The sums go replica by replica, as if no device had replicas of both experts of a
    move.

    Args:
      problem: of one layer.
      state: where it is now.
      features: from `featurize`.
      homes: from `find_homes`, or None.
      max_replicas: [] int32, see `Limits`.

    Returns:
      An `Effects`.
    """
    expert_ID, is_filled_ID = features.expert_ID, features.is_filled_ID
    count_E = state.count_E.astype(jnp.float32)
    one_more_E = problem.weight / (count_E + 1)
    one_less_E = problem.weight / jnp.maximum(count_E - 1, 1)
    used_1D, per_share_1D = features.used_D[None], features.per_share_D[None]
    here_ID = jnp.maximum(features.replicas_here_ID, 1).astype(jnp.float32)

    def change(load_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns each replica's rise, its device's use, and its part of phi's rise."""
        more_ID = jnp.where(is_filled_ID, load_E[expert_ID] - features.load_ID, 0.0)
        use_ID = used_1D + more_ID * here_ID * per_share_1D
        rise_ID = (phi(use_ID) - features.phi_D[None]) / here_ID
        return more_ID, use_ID, jnp.where(is_filled_ID, rise_ID, 0.0)

    more_ID, use_ID, rise_ID = change(one_less_E)
    _, _, fall_ID = change(one_more_E)
    device_D = jnp.arange(expert_ID.shape[1], dtype=jnp.int32)
    is_hottest_ID = is_filled_ID & (use_ID >= COOLER) & (device_D != features.hot)[None]
    hottest_ID = is_hottest_ID.astype(jnp.float32)
    # One scatter for three sums: each is a program of its own.
    parts_ID3 = jnp.stack([rise_ID, -fall_ID, hottest_ID], axis=-1)
    sum_E3 = jnp.zeros((len(count_E), 3), jnp.float32).at[expert_ID].add(parts_ID3)
    rise_E, relief_E, hottest_E = sum_E3[:, 0], sum_E3[:, 1], sum_E3[:, 2]
    is_free_ID = ~is_filled_ID | (state.count_E[expert_ID] > 1)
    if homes is not None:
        is_free_ID &= ~homes.is_last_ID
    return Effects(
        one_more_E=one_more_E,
        relief_E=relief_E,
        may_gain_E=state.count_E < max_replicas,
        harm_ID=jnp.where(is_filled_ID, rise_E[expert_ID] - rise_ID * here_ID, 0.0),
        more_ID=more_ID,
        freed_ID=features.load_ID - (here_ID - 1) * more_ID,
        is_free_ID=is_free_ID,
        is_cooler_ID=~is_filled_ID | (hottest_E[expert_ID] == hottest_ID * here_ID),
    )


def phi(used: jax.Array) -> jax.Array:
    """Returns used^16: summed over devices, the 16th power of the smoothed peak.

    Args:
      used: [...] float32.

    Returns:
      [...] float32.

    Examples:
      >>> float(phi(jnp.float32(2)))
      65536.0
    """
    for _ in range(_DOUBLINGS):
        used = used * used
    return used
