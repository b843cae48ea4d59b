"""Greedy packing and greedy replication: the two loops inside EPLB.

Both loops of `deepseek-ai/EPLB@5791971 eplb.py` repeat one thing many times:
take the smallest (or largest) of a few hundred numbers, change it, put it back.
Here every number is an int64 key that holds the value, the index that breaks
ties, and a count, so that one `min` finds all three; the keys lie in a
tournament of two levels, so that a step reads one block and not all keys; and
all layers take the same step at once. There is no host callback and no
data-dependent shape: the same program runs on CPU and GPU, and under `vmap`.

Shape suffixes: R rows (layers, or layers times nodes), N items, M packs,
E experts, B blocks of K keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.arrays import divide, in_rows, invert, put, take

# A key: 31 bits of value, 16 bits of index, 16 bits of count. Non-negative floats
# order like their bit patterns, so int64 order is (value, index) order.
_INDEX_BITS = 16
_VALUE_SHIFT = 2 * _INDEX_BITS
_FIELD_MASK = (1 << _INDEX_BITS) - 1
_LOW_MASK = (1 << _VALUE_SHIFT) - 1
_LARGEST_VALUE = (1 << 31) - 1
# Puts loads behind all others without changing their order among each other.
_BEHIND = 2.0**-40
MAX_SLOTS = 1 << (_INDEX_BITS - 1)


def balanced_packing(weight: jax.Array, num_packs: int) -> tuple[jax.Array, jax.Array]:
    """Packs n items into equally full packs, heaviest first, lightest pack first.

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
      >>> import jax.numpy as jnp
      >>> pack_index, rank = balanced_packing(jnp.array([[5.0, 4.0, 3.0, 2.0]]), 2)
      >>> pack_index.tolist(), rank.tolist()
      ([[0, 1, 1, 0]], [[0, 0, 1, 1]])
    """
    weight_RN = jnp.asarray(weight, jnp.float32)
    num_items = weight_RN.shape[-1]
    if num_packs < 1 or num_items % num_packs:
        raise ValueError(
            f"{num_packs=} must divide the number of items {num_items}, since every "
            "pack holds equally many; change one of them."
        )
    return _packs_and_ranks(weight_RN, num_packs)


def replicate_experts(
    weight: jax.Array, num_phy: int, limits: Sequence[jax.Array] = ()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives each further replica to the expert whose replicas are heaviest.

    Upstream's `replicate_experts` (`deepseek-ai/EPLB@5791971 eplb.py`); of equally
    heavy experts the first is taken.

    Args:
      weight: [rows, experts] float32, not negative.
      num_phy: number of replicas to make in total, at least one per expert.
      limits: [rows] int32 each; an expert that has reached such a number of replicas
        gets another one only when all have. Upstream knows no limits.

    Returns:
      phy2log: [rows, num_phy] int32, the expert of each replica.
      rank: [rows, num_phy] int32, which replica of its expert it is, from 0.
      logcnt: [rows, experts] int32, replicas of each expert.

    Raises:
      ValueError: if there are fewer replicas than experts.

    Examples:
      >>> import jax.numpy as jnp
      >>> phy2log, rank, logcnt = replicate_experts(jnp.array([[9.0, 1.0, 5.0]]), 5)
      >>> phy2log.tolist(), rank.tolist(), logcnt.tolist()
      ([[0, 1, 2, 0, 2]], [[0, 0, 0, 1, 1]], [[2, 1, 2]])
    """
    weight_RE = jnp.asarray(weight, jnp.float32)
    num_log = weight_RE.shape[1]
    if num_phy < num_log:
        raise ValueError(
            f"{num_phy=} is less than the number of experts {num_log}, and every "
            "expert needs a replica; use more replicas."
        )
    _check_size("num_phy", num_phy)
    return _replicate(weight_RE, num_phy, tuple(limits))


@functools.partial(jax.jit, static_argnums=1)
def _packs_and_ranks(
    weight_RN: jax.Array, num_packs: int
) -> tuple[jax.Array, jax.Array]:
    order_RN, slot_RN = pack_in_order(weight_RN, num_packs)
    slot_RN = invert(order_RN, slot_RN)
    items_per_pack = weight_RN.shape[1] // num_packs
    return slot_RN // items_per_pack, slot_RN % items_per_pack


@functools.partial(jax.jit, static_argnums=1)
def _replicate(
    weight_RE: jax.Array, num_phy: int, limits: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_rows, num_log = weight_RE.shape
    expert_E = jnp.arange(num_log, dtype=jnp.int32)
    phy2log = jnp.broadcast_to(expert_E, (num_rows, num_log))
    rank = jnp.zeros((num_rows, num_log), jnp.int32)
    logcnt = jnp.ones((num_rows, num_log), jnp.int32)
    if num_phy == num_log:
        return phy2log, rank, logcnt

    row_R = jnp.arange(num_rows, dtype=jnp.int32)

    def replicate(key_R: jax.Array, _: jax.Array) -> jax.Array:
        expert_R, count_R = _fields(key_R)
        load_R = take(weight_RE.reshape(-1), row_R * num_log + expert_R)
        value_R = divide(load_R, count_R + 1)
        for limit_R in limits:
            value_R = jnp.where(count_R + 1 >= limit_R, value_R * _BEHIND, value_R)
        return _descending(value_R) | ((key_R & _LOW_MASK) + 1)

    with jax.enable_x64(True):
        low_1E = (expert_E.astype(jnp.int64)[None] << _INDEX_BITS) + 1
        keys_ER = (_descending(weight_RE) | low_1E).T
        taken_NR = _tournament(keys_ER, num_phy - num_log, replicate)
    extra_RN, extra_rank_RN = taken_NR.T >> _INDEX_BITS, taken_NR.T & _FIELD_MASK
    logcnt = (
        logcnt.reshape(-1)
        .at[in_rows(extra_RN, num_log)]
        .add(1, mode="promise_in_bounds", wrap_negative_indices=False)
    )
    return (
        jnp.concatenate([phy2log, extra_RN], axis=1),
        jnp.concatenate([rank, extra_rank_RN], axis=1),
        logcnt.reshape(num_rows, num_log),
    )


@functools.partial(jax.jit, static_argnums=1)
def pack_in_order(weight_RN: jax.Array, num_packs: int) -> tuple[jax.Array, jax.Array]:
    """`balanced_packing`, in the order in which the items are placed.

    Args:
      weight_RN: [rows, items] float32, not negative.
      num_packs: number of packs; divides the number of items.

    Returns:
      order: [rows, items] int32, the items, heaviest first.
      slot: [rows, items] int32, where each of them goes: pack * items_per_pack
        + rank_in_pack.

    Examples:
      >>> import jax.numpy as jnp
      >>> order, slot = pack_in_order(jnp.array([[2.0, 5.0, 3.0, 4.0]]), 2)
      >>> order.tolist(), slot.tolist()
      ([[1, 3, 2, 0]], [[0, 2, 3, 1]])
    """
    num_rows, num_items = weight_RN.shape
    _check_size("the number of items", num_items)
    capacity = num_items // num_packs
    if capacity == 1:  # upstream keeps the items where they are, and sorts nothing
        item_N = jnp.arange(num_items, dtype=jnp.int32)
        item_RN = jnp.broadcast_to(item_N, (num_rows, num_items))
        return item_RN, item_RN

    with jax.enable_x64(True):
        item_1N = jnp.arange(num_items, dtype=jnp.int64)[None]
        # One sort operand: XLA:CPU sorts a lone integer array about five times
        # faster than a (key, index) pair, and the key carries the weight along.
        sorted_RN = lax.sort(_descending(weight_RN) | item_1N, is_stable=False)
        order_RN = (sorted_RN & _LOW_MASK).astype(jnp.int32)
        sorted_weight_NR = _from_bits(_LARGEST_VALUE - (sorted_RN >> _VALUE_SHIFT)).T
        keys_MR, slot_MR = _open_packs(sorted_weight_NR[:num_packs], capacity)

        def add(key_R: jax.Array, step: jax.Array) -> jax.Array:
            item_R = lax.dynamic_index_in_dim(
                sorted_weight_NR, num_packs + step, keepdims=False
            )
            load_R = _from_bits(key_R >> _VALUE_SHIFT) + item_R
            return _pack_keys(_bits(load_R), (key_R & _LOW_MASK) + 1, capacity)

        taken_NR = _tournament(keys_MR, num_items - num_packs, add)
    slot_NR = (taken_NR >> _INDEX_BITS) * capacity + (taken_NR & _FIELD_MASK)
    return order_RN, jnp.concatenate([slot_MR, slot_NR]).T


@jax.jit
def _open_packs(first_MR: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The packs' keys, and the items' slots, when as many items as packs are placed.

    These items need no search: each with a load opens a pack of its own, and the
    packs that are left fill up with loadless items, one after the other.
    """
    num_packs = first_MR.shape[0]
    pack_M1 = jnp.arange(num_packs, dtype=jnp.int64)[:, None]
    opened_1R = (first_MR > 0).sum(axis=0, dtype=jnp.int64, keepdims=True)
    is_open_MR = pack_M1 < opened_1R
    beyond_MR = pack_M1 - opened_1R
    loadless_MR = num_packs - opened_1R - beyond_MR * capacity
    count_MR = jnp.where(is_open_MR, 1, jnp.clip(loadless_MR, 0, capacity))
    low_MR = (pack_M1 << _INDEX_BITS) | count_MR
    value_MR = jnp.where(is_open_MR, _bits(first_MR), 0)
    slot_MR = jnp.where(
        is_open_MR, pack_M1 * capacity, opened_1R * capacity + beyond_MR
    )
    return _pack_keys(value_MR, low_MR, capacity), slot_MR.astype(jnp.int32)


def _tournament(
    keys_NR: jax.Array,
    num_steps: int,
    change: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Takes the smallest key of each row, `num_steps` times, and changes it.

    Args:
      keys_NR: [keys, rows] int64.
      num_steps: how often.
      change: (key [rows], step []) -> the key that replaces it [rows]; it keeps the
        index field.

    Returns:
      [num_steps, rows] int32, index and count of the keys taken.
    """
    num_keys, num_rows = keys_NR.shape
    # A step reads the blocks' minima and one block: both near the square root.
    block = num_keys if num_keys <= 16 else 1 << round(math.log2(num_keys) / 2)
    padding = ((0, -num_keys % block), (0, 0))
    largest = jnp.iinfo(jnp.int64).max
    padded_NR = jnp.pad(keys_NR, padding, constant_values=largest)
    keys_BKR = padded_NR.reshape(-1, block, num_rows)
    block_B1 = jnp.arange(keys_BKR.shape[0], dtype=jnp.int32)[:, None]
    # Keys are addressed by one number: XLA builds index vectors in a pass of its own.
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    inside_KR = jnp.arange(block * num_rows, dtype=jnp.int32).reshape(block, num_rows)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        keys, smallest_BR, taken_NR = carry
        key_R = smallest_BR.min(axis=0)
        index_R, _ = _fields(key_R)
        block_1R = (index_R // block)[None]
        # Write first, then read the block: in the other order XLA keeps the old
        # keys alive and copies all of them in every step.
        keys = put(keys, index_R * num_rows + row_R, change(key_R, i))
        block_KR = take(keys, block_1R * (block * num_rows) + inside_KR)
        smallest_1R = block_KR.min(axis=0, keepdims=True)
        smallest_BR = jnp.where(block_B1 == block_1R, smallest_1R, smallest_BR)
        taken_NR = lax.dynamic_update_index_in_dim(
            taken_NR, key_R.astype(jnp.int32), i, 0
        )
        return keys, smallest_BR, taken_NR

    taken_NR = jnp.zeros((num_steps, num_rows), jnp.int32)
    carry = (keys_BKR.reshape(-1), keys_BKR.min(axis=1), taken_NR)
    return lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, carry)[2]


def _fields(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index and count of a key, int32."""
    low = key.astype(jnp.int32)
    return (low >> _INDEX_BITS) & _FIELD_MASK, low & _FIELD_MASK


def _bits(value: jax.Array) -> jax.Array:
    """The bit pattern of non-negative float32 values, as int64: same order."""
    value = jnp.where(value == 0, jnp.float32(0), value)  # -0.0 is no smaller
    return lax.bitcast_convert_type(value, jnp.int32).astype(jnp.int64)


def _from_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def _descending(value: jax.Array) -> jax.Array:
    """Keys whose ascending order is the descending order of the values."""
    return (_LARGEST_VALUE - _bits(value)) << _VALUE_SHIFT


def _pack_keys(value: jax.Array, low: jax.Array, capacity: int) -> jax.Array:
    """Keys of packs; a full pack is heavier than any other."""
    is_full = (low & _FIELD_MASK) == capacity
    return (jnp.where(is_full, _LARGEST_VALUE, value) << _VALUE_SHIFT) | low


def _check_size(name: str, size: int) -> None:
    if size > MAX_SLOTS:
        raise ValueError(
            f"{name} is {size}, but a sort key holds at most {MAX_SLOTS}; use fewer."
        )
