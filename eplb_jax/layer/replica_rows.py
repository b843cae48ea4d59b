"""Rows of the replicas that a placement has, so that devices are even.

Two replicas of an expert on two devices are a way by which one of the devices can get
rid of rows at no cost. In each round devices pair up along such ways; the one that is
nearer to its target reaches it exactly, by giving the other all that it has too much,
or by taking what it lacks. So fewer and fewer devices are off their target, and every
device that is not costs a fetched expert less.

Shape suffixes: see `eplb_jax`; here Y entries of another row. X are physical experts in
the order of their experts, Y pairs of replicas, S - E of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eplb_jax.layer.ids import is_repeated
from eplb_jax.placement import ExpertTables

# After eight rounds hardly any pair is left that helps (recorded loads, 288 physical
# experts on 32 devices). The first ones only join devices that are both off.
_NUM_ROUNDS = 8
_NUM_DIRECT_ROUNDS = 2
_MOST = 1 << 28


class Held(NamedTuple):
    """What the devices hold, without an expert's second replica on one device.

    Attributes:
      expert_DI: [devices, physical experts of a device] int32, -1 for none.
      order_X: [physical experts] int32, sorted by expert; those of none come last.
      position_S: [physical experts] int32, the position of each in that order.
    """

    expert_DI: jax.Array
    order_X: jax.Array
    position_S: jax.Array


def hold(tables: ExpertTables, num_devices: int) -> Held:
    """Reads the tables of one layer."""
    expert_DI = tables.physical_to_logical_map.reshape(num_devices, -1)
    if expert_DI.size > tables.num_experts:
        expert_DI = jnp.where(is_repeated(expert_DI), -1, expert_DI)
    key_S = jnp.where(expert_DI < 0, tables.num_experts, expert_DI).reshape(-1)
    order_X = jnp.argsort(key_S, stable=True).astype(jnp.int32)
    # Comparisons: XLA for CPUs makes a loop of a scatter, and a second sort is slower.
    index_X = jnp.arange(len(order_X), dtype=jnp.int32)
    is_at_XS = order_X[:, None] == index_X[None]
    position_S = jnp.where(is_at_XS, index_X[:, None], 0).sum(axis=0, dtype=jnp.int32)
    return Held(expert_DI, order_X, position_S)


def share_evenly(total_E: jax.Array, held: Held) -> jax.Array:
    """Divides the rows of each expert evenly among the devices that hold it.

    Returns:
      [devices, physical experts of a device] int32.
    """
    expert_S = held.expert_DI.reshape(-1)
    if len(expert_S) == len(total_E):
        return total_E[expert_S].reshape(held.expert_DI.shape)
    sorted_X = expert_S[held.order_X]
    position_X = jnp.arange(len(sorted_X), dtype=jnp.int32)
    is_new_X = jnp.pad(sorted_X[1:] != sorted_X[:-1], (1, 0), constant_values=True)
    first_X = lax.cummax(jnp.where(is_new_X, position_X, 0))
    is_last_X = jnp.pad(is_new_X[1:], (0, 1), constant_values=True)
    last_X = jnp.where(is_last_X, position_X, len(sorted_X))
    last_X = lax.cummin(last_X, reverse=True)
    count_X, rank_X = last_X - first_X + 1, position_X - first_X
    total_X = jnp.where(sorted_X < 0, 0, total_E[sorted_X])
    is_one_more_X = rank_X < total_X % count_X
    rows_X = total_X // count_X + is_one_more_X.astype(jnp.int32)
    return rows_X[held.position_S].reshape(held.expert_DI.shape)


def level_replicas(
    rows_DI: jax.Array,
    held: Held,
    target_D: jax.Array,
    num_experts: int,
    *,
    may_pull: bool,
) -> jax.Array:
    """Moves rows between replicas until few devices are off their target.

    Args:
      rows_DI: [devices, physical experts of a device] int32.
      held: from `hold`.
      target_D: [devices] int32.
      num_experts: logical experts.
      may_pull: whether devices that have too few rows shall reach their target as well;
        else only those with too many count.

    Returns:
      [devices, physical experts of a device] int32, the same sum for each expert.
    """
    num_devices, per_device = rows_DI.shape
    rows_S, num_pairs = rows_DI.reshape(-1), rows_DI.size - num_experts
    if num_pairs <= 0 or num_devices == 1:
        return rows_DI
    one_Y, two_Y, is_pair_Y = _pairs(held, num_pairs)
    at_Y = one_Y // per_device, two_Y // per_device
    device_D1 = jnp.arange(num_devices, dtype=jnp.int32)[:, None]
    is_one_DY, is_two_DY = (at[None] == device_D1 for at in at_Y)
    index_Y = jnp.arange(num_pairs, dtype=jnp.int32)
    # Pairs of one expert follow each other: the second of one is the first of the next.
    is_next_Y = jnp.pad(two_Y[:-1] == one_Y[1:], (1, 0))

    rows_one_Y, rows_two_Y = rows_S[one_Y], rows_S[two_Y]
    excess_D = rows_DI.sum(axis=1, dtype=jnp.int32) - target_D
    moved_Y = jnp.zeros_like(one_Y)
    for i in range(_NUM_ROUNDS):
        flow_Y, score_Y = _proposals(
            excess_D[at_Y[0]],
            excess_D[at_Y[1]],
            rows_one_Y,
            rows_two_Y,
            None if i < _NUM_DIRECT_ROUNDS else _is_uphill(i, num_devices, *at_Y),
            may_pull,
        )
        score_Y = jnp.where(is_pair_Y, score_Y, 0)
        best_D = jnp.argmax(jnp.where(is_one_DY | is_two_DY, score_Y[None], 0), axis=1)
        is_best_Y = (best_D[at_Y[0]] == index_Y) & (best_D[at_Y[1]] == index_Y)
        flow_Y = jnp.where(is_best_Y & (score_Y > 0), flow_Y, 0)
        excess_D -= jnp.where(is_one_DY, flow_Y[None], 0).sum(axis=1, dtype=jnp.int32)
        excess_D += jnp.where(is_two_DY, flow_Y[None], 0).sum(axis=1, dtype=jnp.int32)
        next_Y = jnp.where(is_next_Y, flow_Y, 0)
        before_Y = jnp.where(is_next_Y, jnp.roll(flow_Y, 1), 0)
        rows_one_Y += before_Y - flow_Y
        rows_two_Y += flow_Y - jnp.roll(next_Y, -1)
        moved_Y += flow_Y
    slot_S1 = jnp.arange(len(rows_S), dtype=jnp.int32)[:, None]
    is_one_SY, is_two_SY = slot_S1 == one_Y[None], slot_S1 == two_Y[None]
    change_SY = jnp.where(is_two_SY, moved_Y[None], 0)
    change_SY -= jnp.where(is_one_SY, moved_Y[None], 0)
    rows_S += change_SY.sum(axis=1, dtype=jnp.int32)
    return rows_S.reshape(rows_DI.shape)


def _pairs(held: Held, num_pairs: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Neighbors among the replicas of each expert, and whether a pair is one."""
    order_X = held.order_X
    sorted_X = held.expert_DI.reshape(-1)[order_X]
    is_pair_X = (sorted_X[1:] == sorted_X[:-1]) & (sorted_X[1:] >= 0)
    at_Y = jnp.argsort(~is_pair_X, stable=True)[:num_pairs]
    return order_X[at_Y], order_X[at_Y + 1], is_pair_X[at_Y]


def _proposals(
    one_Y: jax.Array,
    two_Y: jax.Array,
    rows_one_Y: jax.Array,
    rows_two_Y: jax.Array,
    is_uphill_Y: tuple[jax.Array, jax.Array] | None,
    may_pull: bool,
) -> tuple[jax.Array, jax.Array]:
    """What each pair of replicas would move, and how good that is.

    Args:
      one_Y: rows by which the device of the first replica is above its target.
      two_Y: the same for the second.
      rows_one_Y: rows of the first replica; no more can leave it.
      rows_two_Y: the same for the second.
      is_uphill_Y: whether the first, or the second, may move what it has too much to a
        device that is on its target; None: none may. That gains nothing by itself, but
        it may meet another device there that has too few.
      may_pull: see `level_replicas`.

    Returns:
      flow: rows from the first to the second, negative for the reverse.
      score: higher is better; 0 for nothing to be moved.
    """
    size_one_Y, size_two_Y = abs(one_Y), abs(two_Y)
    is_one_Y = size_one_Y <= size_two_Y
    if is_uphill_Y is not None:
        is_one_Y = jnp.where((one_Y == 0) | (two_Y == 0), two_Y == 0, is_one_Y)
    wanted_Y = jnp.where(is_one_Y, one_Y, -two_Y)
    flow_Y = jnp.clip(wanted_Y, -rows_two_Y, rows_one_Y)
    is_all_Y = flow_Y == wanted_Y
    is_off_Y = (one_Y != 0) & (two_Y != 0)
    is_opposite_Y = is_off_Y & ((one_Y > 0) != (two_Y > 0))
    is_alike_Y = is_off_Y & ~is_opposite_Y & is_all_Y
    if not may_pull:
        is_alike_Y &= one_Y > 0
    # Three classes, the better ones first; in a class, the most rows.
    size_Y = jnp.minimum(jnp.minimum(size_one_Y, size_two_Y), abs(flow_Y))
    size_Y = jnp.minimum(size_Y, _MOST - 1)
    score_Y = jnp.where(is_alike_Y, 2 * _MOST + size_Y, 0)
    score_Y = jnp.where(is_opposite_Y & (flow_Y != 0), 3 * _MOST + size_Y, score_Y)
    if is_uphill_Y is not None:
        is_first_Y, is_second_Y = is_uphill_Y
        is_hop_Y = ((one_Y == 0) & is_second_Y) | ((two_Y == 0) & is_first_Y)
        is_hop_Y &= ((one_Y == 0) != (two_Y == 0)) & is_all_Y
        if not may_pull:
            is_hop_Y &= jnp.maximum(one_Y, two_Y) > 0
        few_Y = _MOST - jnp.minimum(abs(flow_Y), _MOST - 1)
        score_Y = jnp.where(is_hop_Y, _MOST - 1 + few_Y, score_Y)
    return flow_Y, score_Y


def _is_uphill(
    i: int, num_devices: int, at_one_Y: jax.Array, at_two_Y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """An order of the devices that differs between rounds: what hops goes on."""
    rank_D = np.random.default_rng(i).permutation(num_devices).astype(np.int32)
    rank_one_Y, rank_two_Y = (
        jnp.asarray(rank_D)[at_one_Y],
        jnp.asarray(rank_D)[at_two_Y],
    )
    return rank_two_Y > rank_one_Y, rank_one_Y > rank_two_Y
