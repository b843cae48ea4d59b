"""Rows of the shared expert, to devices that have few other rows.

All devices hold the shared expert, so its rows even devices out without a fetch; they
travel as other rows do. SGLang calls this Waterfill.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eplb_jax.layer.sorting import comes_before

# Extra slots that are left room for each device that has too many rows: it gives away
# one expert or two, and what it gives is cut between the devices that have room. With
# fewer, slots run out; with more, more devices fetch.
_SLOTS_OF_GIVER = 3


def spread_shared(
    load_D: jax.Array, target_D: jax.Array, shared_D: jax.Array, num_fetched: int
) -> jax.Array:
    """Says how many rows of the shared expert each device computes.

    What devices have above their target goes to devices that fetch experts. Their room
    is left free, in few devices; the others fill theirs with shared rows, first with
    their own.

    Args:
      load_D: [devices] int32, other rows of each.
      target_D: [devices] int32, rows that each shall have; enough for all rows.
      shared_D: [devices] int32, rows of the shared expert that each has.
      num_fetched: extra slots of a device.

    Returns:
      [devices] int32, of the same sum as `shared_D`.

    Examples:
      >>> load, shared = jnp.array([9, 2, 5, 4]), jnp.array([2, 2, 2, 2])
      >>> spread_shared(load, jnp.full(4, 7), shared, 4).tolist()
      [0, 3, 2, 3]
    """
    room_D = jnp.maximum(target_D - load_D, 0)
    excess_D = jnp.maximum(load_D - target_D, 0)
    surplus = excess_D.sum(dtype=jnp.int32)
    num_slots = _SLOTS_OF_GIVER * (excess_D > 0).sum(dtype=jnp.int32)
    num_fetching = jnp.maximum(-(-num_slots // max(num_fetched, 1)), 1)
    largest_DD = comes_before(room_D)
    each_D = jnp.minimum(room_D, -(-surplus // num_fetching))
    kept_D = _fill(surplus, each_D, largest_DD)
    kept_D += _fill(surplus - kept_D.sum(dtype=jnp.int32), room_D - kept_D, largest_DD)
    room_D -= kept_D
    own_D = jnp.minimum(room_D, shared_D)
    rest = shared_D.sum(dtype=jnp.int32) - own_D.sum(dtype=jnp.int32)
    in_order_DD = np.tri(len(load_D), k=-1, dtype=bool)
    return own_D + _fill(rest, room_D - own_D, in_order_DD)


def _fill(total: jax.Array, room_D: jax.Array, is_before_DD: ArrayLike) -> jax.Array:
    """Divides a total among the devices: to each what it has room for, in an order."""
    before_D = jnp.where(is_before_DD, room_D[None], 0).sum(axis=1, dtype=jnp.int32)
    return jnp.clip(total - before_D, 0, room_D)
