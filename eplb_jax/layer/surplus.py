"""Rows of devices that have too many, to devices that fetch the experts for them.

What the devices have too much lies on one line, device after device, hottest expert
first; what the others have room for lies on the same line. Where both are cut, a piece
begins: a device fetches the expert of each piece that lies in its room (prefix sums and
comparisons; no loop).

Shape suffixes: see `eplb_jax`; here Y entries of another row. X are the pieces on the
line, Y those of one device and, in the end, its extra slots; A candidates of a plan.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eplb_jax.layer.sorting import comes_before
from eplb_jax.runtime import on_cpu

# Where the extra slots do not suffice, other orders of the devices are tried, and
# targets that are higher by these fractions of the way to the fullest device.
_NUM_ORDERS = 4
_LEVELS = (*[0.0] * _NUM_ORDERS, *np.geomspace(1 / 1024, 1 / 2, 12).tolist())


class _Given(NamedTuple):
    """Rows that stay, [devices, physical experts of a device], and rows of the extra
    slots, [devices, num_fetched], with their experts, -1 for none.
    """

    rows_DI: jax.Array
    expert_DY: jax.Array
    extra_DY: jax.Array

    def most(self, target_D: jax.Array) -> jax.Array:
        load_D = self.rows_DI.sum(axis=1) + self.extra_DY.sum(axis=1)
        return (load_D - target_D).max()


def give_surplus(
    rows_DI: jax.Array,
    expert_DI: jax.Array,
    target_D: jax.Array,
    num_fetched: int,
    num_nodes: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives away what devices have above their target.

    Args:
      rows_DI: [devices, physical experts of a device] int32.
      expert_DI: [devices, physical experts of a device] int32, -1 for none.
      target_D: [devices] int32.
      num_fetched: extra slots of a device.
      num_nodes: nodes that the devices are divided among, in order; devices give to
        those of their node first.

    Returns:
      rows: [devices, physical experts of a device] int32, that stay.
      experts: [devices, num_fetched] int32 that are fetched, -1 for none.
      extra: [devices, num_fetched] int32, rows of these.
    """
    num_devices = len(rows_DI)
    # Inside the nodes first.
    passes = (num_nodes, 1) if num_nodes > 1 else (1,)
    give = functools.partial(_give, rows_DI, expert_DI, num_fetched)
    # Devices with the most rows first.
    zeros_D = jnp.zeros(num_devices, jnp.int32)
    first = give(target_D, zeros_D, num_fetched, passes)

    def others() -> _Given:
        # The largest of more pieces; what finds no free slot may find one later.
        num_pieces, more = 2 * num_fetched + 2, (*passes, 1, 1)

        def give_one(target_D: jax.Array, rank_D: jax.Array) -> _Given:
            return give(target_D, rank_D, num_pieces, more)

        excess = jnp.maximum((rows_DI.sum(axis=1) - target_D).max(), 0)
        level_A = jnp.asarray(_LEVELS, jnp.float32)
        more_A = jnp.ceil(excess.astype(jnp.float32) * level_A).astype(jnp.int32)
        rank_AD = np.zeros((len(_LEVELS), num_devices), np.int32)
        rng = np.random.default_rng(0)
        for order in range(1, _NUM_ORDERS):
            rank_AD[order] = rng.permutation(num_devices)
        target_AD = target_D[None] + more_A[:, None]
        given = jax.vmap(give_one)(target_AD, jnp.asarray(rank_AD))
        given = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, given)
        best = jnp.argmin(jax.vmap(lambda one: one.most(target_D))(given))
        return jax.tree.map(lambda leaf: leaf[best], given)

    is_enough = first.most(target_D) <= 0

    def choose_if_needed() -> _Given:
        return lax.cond(is_enough, lambda: first, others)

    def choose() -> _Given:
        # XLA for GPUs lets the host wait for the condition of a branch; the few kernels
        # that the branch would save take less.
        return jax.tree.map(
            lambda one, other: jnp.where(is_enough, one, other), first, others()
        )

    return tuple(on_cpu(choose_if_needed, choose))


def _give(
    rows_DI: jax.Array,
    expert_DI: jax.Array,
    num_fetched: int,
    target_D: jax.Array,
    rank_D: jax.Array,
    num_pieces: int,
    passes: tuple[int, ...],
) -> _Given:
    """Gives inside groups of devices, as many as each pass says.

    Then removes what is fetched in vain.
    """
    num_free_D, left_D = jnp.full_like(target_D, num_fetched), target_D
    experts, extras = [], []
    for num_groups in passes:
        rows_DI, expert_DY, extra_DY = _give_once(
            rows_DI, expert_DI, left_D, num_free_D, rank_D, num_pieces, num_groups
        )
        num_free_D -= (extra_DY > 0).sum(axis=1, dtype=jnp.int32)
        left_D -= extra_DY.sum(axis=1, dtype=jnp.int32)
        experts.append(expert_DY)
        extras.append(extra_DY)
    expert_DY, extra_DY = (jnp.concatenate(v, axis=1) for v in (experts, extras))
    # To the device's own replica, if it has one of an expert that it was given.
    is_own_DYI = expert_DY[:, :, None] == expert_DI[:, None]
    own_DYI = jnp.where(is_own_DYI, extra_DY[:, :, None], 0)
    rows_DI += own_DYI.sum(axis=1, dtype=jnp.int32)
    extra_DY = jnp.where(is_own_DYI.any(axis=2), 0, extra_DY)
    # To the first of several pieces of one expert.
    is_same_DYY = expert_DY[:, :, None] == expert_DY[:, None]
    is_before_YY = np.tri(expert_DY.shape[1], k=-1, dtype=bool)
    is_again_DY = (is_same_DYY & (extra_DY > 0)[:, None] & is_before_YY[None]).any(
        axis=2
    )
    sum_DY = jnp.where(is_same_DYY, extra_DY[:, None], 0).sum(axis=2, dtype=jnp.int32)
    extra_DY = jnp.where(is_again_DY | (extra_DY == 0), 0, sum_DY)
    order_DY = jnp.argsort(extra_DY == 0, axis=1, stable=True)[:, :num_fetched]
    expert_DY = jnp.where(extra_DY > 0, expert_DY, -1)
    expert_DY, extra_DY = (
        jnp.take_along_axis(v, order_DY, axis=1) for v in (expert_DY, extra_DY)
    )
    return _Given(rows_DI, expert_DY, extra_DY)


def _give_once(
    rows_DI: jax.Array,
    expert_DI: jax.Array,
    target_D: jax.Array,
    num_free_D: jax.Array,
    rank_D: jax.Array,
    num_pieces: int,
    num_nodes: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives to devices of the same node; see `_Given`.

    Args:
      rows_DI: that the devices still have.
      expert_DI: of these.
      target_D: less what the devices were given.
      num_free_D: free slots of each device.
      rank_D: see `_line`.
      num_pieces: that are looked at for each device.
      num_nodes: groups of devices.
    """
    excess_D = rows_DI.sum(axis=1, dtype=jnp.int32) - target_D
    surplus_D = jnp.maximum(excess_D, 0)
    room_D = jnp.where(num_free_D > 0, jnp.maximum(-excess_D, 0), 0)
    longest_N = jnp.maximum(
        *(v.reshape(num_nodes, -1).sum(1) for v in (surplus_D, room_D))
    )
    first_N = jnp.cumsum(longest_N) - longest_N
    start_D = _line(surplus_D, rank_D, first_N)
    room_start_D = _line(room_D, rank_D, first_N)

    # Each device's hottest expert first, ties in order.
    is_hotter_DII = comes_before(rows_DI)
    before_DI = jnp.where(is_hotter_DII, rows_DI[:, None], 0).sum(2, dtype=jnp.int32)
    piece_DI = jnp.clip(surplus_D[:, None] - before_DI, 0, rows_DI)
    start_S = (start_D[:, None] + before_DI).reshape(-1)
    piece_S = piece_DI.reshape(-1)
    # A piece of nothing comes last.
    order_X = jnp.argsort(jnp.where(piece_S > 0, start_S, jnp.iinfo(jnp.int32).max))
    start_X, piece_X = start_S[order_X], piece_S[order_X]
    end_X, expert_X = start_X + piece_X, expert_DI.reshape(-1)[order_X]

    ends_before_DX = (end_X[None] <= room_start_D[:, None]) & (piece_X > 0)[None]
    first_D = ends_before_DX.sum(axis=1, dtype=jnp.int32)
    index_DY = first_D[:, None] + jnp.arange(num_pieces, dtype=jnp.int32)[None]
    is_piece_DY = index_DY < len(piece_X)
    index_DY = jnp.minimum(index_DY, len(piece_X) - 1)
    is_piece_DY &= piece_X[index_DY] > 0
    extra_DY = jnp.minimum(end_X[index_DY], (room_start_D + room_D)[:, None])
    extra_DY -= jnp.maximum(start_X[index_DY], room_start_D[:, None])
    extra_DY = jnp.where(is_piece_DY, jnp.maximum(extra_DY, 0), 0)
    # As many as there are slots, the largest first.
    rank_DY = comes_before(extra_DY).sum(axis=2, dtype=jnp.int32)
    extra_DY = jnp.where(rank_DY < num_free_D[:, None], extra_DY, 0)

    slot_DY = order_X[index_DY]
    slot_S1 = jnp.arange(len(piece_S), dtype=jnp.int32)[:, None]
    is_of_SY = slot_DY.reshape(1, -1) == slot_S1
    taken_SY = jnp.where(is_of_SY, extra_DY.reshape(1, -1), 0)
    rows_DI -= taken_SY.sum(axis=1, dtype=jnp.int32).reshape(rows_DI.shape)
    return rows_DI, jnp.where(extra_DY > 0, expert_X[index_DY], -1), extra_DY


def _line(size_D: jax.Array, rank_D: jax.Array, first_N: jax.Array) -> jax.Array:
    """Where each device's part of a line begins: by rank, then the largest first."""
    size_NX, rank_NX = (v.reshape(len(first_N), -1) for v in (size_D, rank_D))
    is_tie_NXX = rank_NX[:, None] == rank_NX[:, :, None]
    is_ahead_NXX = (rank_NX[:, None] < rank_NX[:, :, None]) | (
        is_tie_NXX & comes_before(size_NX)
    )
    before_NX = jnp.where(is_ahead_NXX, size_NX[:, None], 0).sum(2, dtype=jnp.int32)
    return (first_N[:, None] + before_NX).reshape(-1)
