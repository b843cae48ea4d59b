"""Greedy packing and greedy replication: the two loops inside EPLB.

Both loops of `deepseek-ai/EPLB@5791971 eplb.py` repeat one thing many times:
take the smallest (or largest) of a few hundred numbers, change it, put it back.
Here the numbers are keys of a `tournament`, and all rows take the same step at
once. There is no host callback and no data-dependent shape: the same program
runs on CPU and GPU, and under `vmap`.

Shape suffixes: see `eplb_jax`; here also U packs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.arrays import divide, in_rows, invert, take
from eplb_jax.placement.tournament import (
    FIELD_MASK,
    INDEX_BITS,
    LARGEST_VALUE,
    LOW_MASK,
    VALUE_SHIFT,
    bits,
    check_size,
    descending,
    fields,
    from_bits,
    take_smallest,
)

# Puts loads behind all others and keeps their own order.
_BEHIND = 2.0**-40


def balanced_packing(weight: jax.Array, num_packs: int) -> tuple[jax.Array, jax.Array]:
    """Packs items into packs of equal size, heaviest item first, into the lightest.

    Upstream's `balanced_packing` (`deepseek-ai/EPLB@5791971 eplb.py`) with its
    order of ties fixed: equal items keep their order, and of equally heavy packs
    the first is taken.

    Args:
      weight: [rows, items] float32, not negative.
      num_packs: number of packs; divides the number of items.

    Returns:
      pack_index: [rows, items] int32, the pack of each item.
      rank_in_pack: [rows, items] int32, the item's place in its pack.

    Raises:
      ValueError: if `num_packs` does not divide the number of items.

    Examples:
      >>> pack_index, rank = balanced_packing(jnp.array([[5.0, 4.0, 3.0, 2.0]]), 2)
      >>> pack_index.tolist(), rank.tolist()
      ([[0, 1, 1, 0]], [[0, 0, 1, 1]])
    """
    weight_AX = jnp.asarray(weight, jnp.float32)
    num_items = weight_AX.shape[-1]
    if num_packs < 1 or num_items % num_packs:
        raise ValueError(
            f"{num_packs=} must divide the number of items {num_items}, since packs "
            "hold equally many; change one of them."
        )
    return _packs_and_ranks(weight_AX, num_packs)


def replicate_experts(
    weight: jax.Array, num_phy: int, limits: Sequence[jax.Array] = ()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives each further replica to the expert whose replicas carry the highest load.

    Upstream's `replicate_experts` (`deepseek-ai/EPLB@5791971 eplb.py`); of equally
    loaded experts the first is taken.

    Args:
      weight: [rows, experts] float32, not negative.
      num_phy: number of replicas to make in total, at least one per expert.
      limits: [rows] int32 each; an expert that has reached such a number of replicas
        gets another one only when all have. Upstream has no limits.

    Returns:
      phy2log: [rows, num_phy] int32, the expert of each replica.
      rank: [rows, num_phy] int32, which replica of its expert it is, from 0.
      logcnt: [rows, experts] int32, replicas of each expert.

    Raises:
      ValueError: if there are fewer replicas than experts.

    Examples:
      >>> phy2log, rank, logcnt = replicate_experts(jnp.array([[9.0, 1.0, 5.0]]), 5)
      >>> phy2log.tolist(), rank.tolist(), logcnt.tolist()
      ([[0, 1, 2, 0, 2]], [[0, 0, 0, 1, 1]], [[2, 1, 2]])
    """
    weight_AE = jnp.asarray(weight, jnp.float32)
    num_log = weight_AE.shape[1]
    if num_phy < num_log:
        raise ValueError(
            f"{num_phy=} is less than the number of experts {num_log}, and every "
            "expert needs a replica; use more replicas."
        )
    check_size("num_phy", num_phy)
    return _replicate(weight_AE, num_phy, tuple(limits))


@functools.partial(jax.jit, static_argnums=1)
def _packs_and_ranks(
    weight_AX: jax.Array, num_packs: int
) -> tuple[jax.Array, jax.Array]:
    order_AX, position_AX = pack_in_order(weight_AX, num_packs)
    position_AX = invert(order_AX, position_AX)
    items_per_pack = weight_AX.shape[1] // num_packs
    return position_AX // items_per_pack, position_AX % items_per_pack


@functools.partial(jax.jit, static_argnums=1)
def _replicate(
    weight_AE: jax.Array, num_phy: int, limits: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_rows, num_log = weight_AE.shape
    expert_E = jnp.arange(num_log, dtype=jnp.int32)
    phy2log = jnp.broadcast_to(expert_E, (num_rows, num_log))
    rank = jnp.zeros((num_rows, num_log), jnp.int32)
    logcnt = jnp.ones((num_rows, num_log), jnp.int32)
    if num_phy == num_log:
        return phy2log, rank, logcnt

    row_A = jnp.arange(num_rows, dtype=jnp.int32)

    def replicate(key_A: jax.Array, _: jax.Array) -> jax.Array:
        expert_A, count_A = fields(key_A)
        load_A = take(weight_AE.reshape(-1), row_A * num_log + expert_A)
        value_A = divide(load_A, count_A + 1)
        for limit_A in limits:
            value_A = jnp.where(count_A + 1 >= limit_A, value_A * _BEHIND, value_A)
        return descending(value_A) | ((key_A & LOW_MASK) + 1)

    with jax.enable_x64(True):
        low_1E = (expert_E.astype(jnp.int64)[None] << INDEX_BITS) + 1
        keys_EA = (descending(weight_AE) | low_1E).T
        taken_XA = take_smallest(keys_EA, num_phy - num_log, replicate)
    extra_AX, extra_rank_AX = taken_XA.T >> INDEX_BITS, taken_XA.T & FIELD_MASK
    logcnt = (
        logcnt.reshape(-1)
        .at[in_rows(extra_AX, num_log)]
        .add(1, mode="promise_in_bounds", wrap_negative_indices=False)
    )
    return (
        jnp.concatenate([phy2log, extra_AX], axis=1),
        jnp.concatenate([rank, extra_rank_AX], axis=1),
        logcnt.reshape(num_rows, num_log),
    )


@functools.partial(jax.jit, static_argnums=1)
def pack_in_order(weight_AX: jax.Array, num_packs: int) -> tuple[jax.Array, jax.Array]:
    """Packs like `balanced_packing`, with results in the order of placing.

    Args:
      weight_AX: [rows, items] float32, not negative.
      num_packs: number of packs; divides the number of items.

    Returns:
      order: [rows, items] int32, the items, heaviest first.
      position: [rows, items] int32, where each of them goes: pack * items_per_pack
        + rank_in_pack.

    Examples:
      >>> order, position = pack_in_order(jnp.array([[2.0, 5.0, 3.0, 4.0]]), 2)
      >>> order.tolist(), position.tolist()
      ([[1, 3, 2, 0]], [[0, 2, 3, 1]])
    """
    num_rows, num_items = weight_AX.shape
    check_size("the number of items", num_items)
    capacity = num_items // num_packs
    if capacity == 1:  # upstream keeps the items where they are, and sorts nothing
        item_X = jnp.arange(num_items, dtype=jnp.int32)
        item_AX = jnp.broadcast_to(item_X, (num_rows, num_items))
        return item_AX, item_AX

    with jax.enable_x64(True):
        item_1X = jnp.arange(num_items, dtype=jnp.int64)[None]
        # One sort operand: XLA:CPU sorts a lone integer array about five times
        # faster than a (key, index) pair, and the key carries the weight along.
        sorted_AX = lax.sort(descending(weight_AX) | item_1X, is_stable=False)
        order_AX = (sorted_AX & LOW_MASK).astype(jnp.int32)
        sorted_weight_XA = from_bits(LARGEST_VALUE - (sorted_AX >> VALUE_SHIFT)).T
        keys_UA, position_UA = _open_packs(sorted_weight_XA[:num_packs], capacity)

        def add(key_A: jax.Array, step: jax.Array) -> jax.Array:
            item_A = lax.dynamic_index_in_dim(
                sorted_weight_XA, num_packs + step, keepdims=False
            )
            load_A = from_bits(key_A >> VALUE_SHIFT) + item_A
            return _pack_keys(bits(load_A), (key_A & LOW_MASK) + 1, capacity)

        taken_XA = take_smallest(keys_UA, num_items - num_packs, add)
    position_XA = (taken_XA >> INDEX_BITS) * capacity + (taken_XA & FIELD_MASK)
    return order_AX, jnp.concatenate([position_UA, position_XA]).T


@jax.jit
def _open_packs(first_UA: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Places as many items as there are packs; returns keys and the items' positions.

    These items need no search: each item with a load opens another pack, and the
    remaining packs fill up with loadless items, one after the other.
    """
    num_packs = first_UA.shape[0]
    pack_U1 = jnp.arange(num_packs, dtype=jnp.int64)[:, None]
    opened_1A = (first_UA > 0).sum(axis=0, dtype=jnp.int64, keepdims=True)
    is_open_UA = pack_U1 < opened_1A
    beyond_UA = pack_U1 - opened_1A
    loadless_UA = num_packs - opened_1A - beyond_UA * capacity
    count_UA = jnp.where(is_open_UA, 1, jnp.clip(loadless_UA, 0, capacity))
    low_UA = (pack_U1 << INDEX_BITS) | count_UA
    value_UA = jnp.where(is_open_UA, bits(first_UA), 0)
    position_UA = jnp.where(
        is_open_UA, pack_U1 * capacity, opened_1A * capacity + beyond_UA
    )
    return _pack_keys(value_UA, low_UA, capacity), position_UA.astype(jnp.int32)


def _pack_keys(value: jax.Array, low: jax.Array, capacity: int) -> jax.Array:
    """Makes the keys of packs; a full pack is heavier than any other."""
    is_full = (low & FIELD_MASK) == capacity
    return (jnp.where(is_full, LARGEST_VALUE, value) << VALUE_SHIFT) | low
