"""The placements that a search starts from: replicas dealt out, and packed.

Shape suffixes: see `eplb_jax`; one layer unless an L is there.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement.arrays import count_replicas, invert, take_rows
from eplb_jax.placement.packing import pack_in_order


def pack(
    weight_LE: jax.Array, expert_LS: jax.Array, num_homes: int, num_devices: int
) -> jax.Array:
    """Packs replicas to the devices of their home node, as upstream does.

    Args:
      weight_LE: [layers, experts] float32 loads.
      expert_LS: [layers, physical experts] int32, node by node, -1 if empty.
      num_homes: nodes that experts are at home on.
      num_devices: devices; a multiple of `num_homes`.

    Returns:
      [layers, physical experts] int32, node by node and device by device.
    """
    num_experts = weight_LE.shape[1]
    count_LE = jax.vmap(lambda e_S: count_replicas(e_S, num_experts))(expert_LS)
    load_LE = weight_LE / jnp.maximum(count_LE, 1).astype(jnp.float32)
    load_LS = take_rows(load_LE, jnp.maximum(expert_LS, 0))
    rows = (len(expert_LS) * num_homes, -1)
    order_AX, position_AX = pack_in_order(
        load_LS.reshape(rows), num_devices // num_homes
    )
    sorted_AX = take_rows(expert_LS.reshape(rows), order_AX)
    return invert(position_AX, sorted_AX).reshape(expert_LS.shape)


class _Dealt(NamedTuple):
    expert_DI: jax.Array
    filled_D: jax.Array
    load_D: jax.Array
    load_N: jax.Array


def deal(
    weight_E: jax.Array,
    expert_S: jax.Array,
    rank_S: jax.Array,
    home_E: jax.Array,
    per_share_D: jax.Array,
    num_nodes: int,
) -> jax.Array:
    """Deals replicas one by one, heaviest first, to the device that stays least used.

    No device gets two replicas of one expert, and replicas stay on their expert's home
    node, as long as there is room; for this, with homes, each expert's first replica
    is placed before all others. Of equally used devices the one on the least used node
    is taken, so that nodes stay even where every device has a single physical expert
    (`deepseek-ai/EPLB#14`).

    Args:
      weight_E: [experts] float32 loads.
      expert_S: [physical experts] int32, the replicas to place, -1 for none.
      rank_S: [physical experts] int32, which of its expert's replicas each is.
      home_E: [experts] int32, home node of each expert, or -1.
      per_share_D: [devices] float32, see `PlacementProblem`.
      num_nodes: nodes; divides the number of devices.

    Returns:
      [physical experts] int32, device by device, -1 if empty.
    """
    num_physical_experts, num_devices = expert_S.shape[0], per_share_D.shape[0]
    per_device = num_physical_experts // num_devices
    devices_per_node = num_devices // num_nodes
    count_E = count_replicas(expert_S, weight_E.shape[0])
    load_E = weight_E / jnp.maximum(count_E, 1).astype(jnp.float32)
    load_S = jnp.where(expert_S >= 0, load_E[expert_S], -1.0)
    is_first_S = (rank_S == 0) & (home_E[expert_S] >= 0)
    order_S = jnp.argsort(-load_S - jnp.where(is_first_S, 2.0, 0.0), stable=True)
    share_D = jnp.where(per_share_D > 0, 1.0 / jnp.maximum(per_share_D, 1.0), 0.0)
    share_N = share_D.reshape(num_nodes, -1).sum(axis=1)
    per_share_N = jnp.where(share_N > 0, 1.0 / jnp.maximum(share_N, 1e-9), 0.0)
    node_D = jnp.arange(num_devices, dtype=jnp.int32) // devices_per_node

    def place(step: jax.Array, dealt: _Dealt) -> _Dealt:
        s = order_S[step]
        expert, load, home = expert_S[s], load_S[s], home_E[expert_S[s]]
        has_room_D = (dealt.filled_D < per_device) & (per_share_D > 0)
        is_away_D = (home >= 0) & (node_D != home)
        is_there_D = (dealt.expert_DI == expert).any(axis=1)
        used_D = (dealt.load_D + load) * per_share_D
        used_N = (dealt.load_N + load) * per_share_N
        # In this order: room, no duplicate, home, use; a thousandth of the node's use.
        cost_D = used_D + 1e-3 * used_N[node_D]
        for worse, is_so_D in ((1e6, is_away_D), (2e6, is_there_D), (4e6, ~has_room_D)):
            cost_D += jnp.where(is_so_D, jnp.float32(worse), 0.0)
        d = jnp.argmin(cost_D)
        is_placed = (expert >= 0) & has_room_D[d]
        i = jnp.minimum(dealt.filled_D[d], per_device - 1)
        placed = jnp.where(is_placed, expert, dealt.expert_DI[d, i])
        load = jnp.where(is_placed, load, 0.0)
        return _Dealt(
            dealt.expert_DI.at[d, i].set(placed),
            dealt.filled_D.at[d].add(is_placed.astype(jnp.int32)),
            dealt.load_D.at[d].add(load),
            dealt.load_N.at[node_D[d]].add(load),
        )

    dealt = _Dealt(
        expert_DI=jnp.full((num_devices, per_device), -1, jnp.int32),
        filled_D=jnp.zeros(num_devices, jnp.int32),
        load_D=jnp.zeros(num_devices, jnp.float32),
        load_N=jnp.zeros(num_nodes, jnp.float32),
    )
    dealt = lax.fori_loop(0, num_physical_experts, place, dealt)
    return dealt.expert_DI.reshape(-1)
