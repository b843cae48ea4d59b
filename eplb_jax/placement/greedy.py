"""EPLB's own two policies, hierarchical and global, as one jitted function.

`deepseek-ai/EPLB@5791971 eplb.py`, `rebalance_experts_hierarchical`: pack groups
of experts to nodes, replicate experts within a node, pack the replicas to GPUs.
The global policy is the same with one group and one node.

Shape suffixes: see `eplb_jax`. A row is a node of a layer.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from eplb_jax.placement.arrays import divide, invert, take_rows
from eplb_jax.placement.packing import pack_in_order, replicate_experts

# torch 2.13's float32 sum on x86-64 (ATen/native/cpu/SumKernel.cpp).
_LANES = 8
_CHAINS = 4
_LEVELS = 4


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def greedy_placement(
    weight_LE: jax.Array,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Places experts as upstream's hierarchical policy does, bit for bit.

    With one group and one node, this is upstream's global policy.

    Args:
      weight_LE: [layers, experts] float32 loads.
      num_replicas: physical experts per layer; a multiple of `num_devices`.
      num_groups: groups of experts; a multiple of `num_nodes`.
      num_nodes: nodes.
      num_devices: devices; a multiple of `num_nodes`.

    Returns:
      expert: [layers, num_replicas] int32, the expert of each physical expert.
      rank: [layers, num_replicas] int32, which of that expert's replicas it is.
      count: [layers, experts] int32, replicas of each expert.

    Examples:
      >>> weight = jnp.array([[8.0, 1.0, 3.0, 2.0]])
      >>> expert, rank, count = greedy_placement(weight, 6, 2, 2, 2)
      >>> expert.tolist(), rank.tolist(), count.tolist()
      ([[0, 0, 1, 3, 2, 2]], [[0, 1, 0, 0, 0, 1]], [[2, 1, 2, 1]])
    """
    num_layers, num_experts = weight_LE.shape
    per_node = num_experts // num_nodes
    # Step 1: pack groups to nodes. With one group per node, upstream keeps their order.
    order_LE = None
    weight_AE = weight_LE
    if num_groups != num_nodes:
        order_LE = experts_by_node(weight_LE, num_groups, num_nodes)
        weight_AE = take_rows(weight_LE, order_LE)
    weight_AE = weight_AE.reshape(num_layers * num_nodes, per_node)

    # Step 2: replicate experts within their node.
    replica_AX, rank_AX, count_AE = replicate_experts(
        weight_AE, num_replicas // num_nodes
    )

    # Step 3: pack replicas to the devices of the node.
    load_AX = take_rows(divide(weight_AE, count_AE), replica_AX)
    item_AX, position_AX = pack_in_order(load_AX, num_devices // num_nodes)
    item_AX = invert(position_AX, item_AX)
    rank_LS = take_rows(rank_AX, item_AX).reshape(num_layers, num_replicas)
    expert_LNX = take_rows(replica_AX, item_AX).reshape(num_layers, num_nodes, -1)
    first_1N1 = per_node * jnp.arange(num_nodes, dtype=jnp.int32)[None, :, None]
    expert_LS = (expert_LNX + first_1N1).reshape(num_layers, num_replicas)
    count_LE = count_AE.reshape(num_layers, num_experts)
    if order_LE is not None:
        expert_LS = take_rows(order_LE, expert_LS)
        count_LE = invert(order_LE, count_LE)
    return expert_LS, rank_LS, count_LE


@functools.partial(jax.jit, static_argnums=(1, 2))
def experts_by_node(weight_LE: jax.Array, num_groups: int, num_nodes: int) -> jax.Array:
    """Sorts the experts by the nodes that their groups are packed to.

    Args:
      weight_LE: [layers, experts] float32 loads.
      num_groups: groups of experts, each a run of consecutive experts; a multiple
        of `num_nodes`.
      num_nodes: nodes.

    Returns:
      [layers, experts] int32: first the experts of node 0, then those of node 1.

    Examples:
      >>> experts_by_node(jnp.array([[1.0, 2, 9, 9, 3, 3, 0, 0]]), 4, 2).tolist()
      [[2, 3, 6, 7, 4, 5, 0, 1]]
    """
    num_layers, num_experts = weight_LE.shape
    if num_groups == num_nodes:  # upstream keeps group i on node i
        expert_E = jnp.arange(num_experts, dtype=jnp.int32)
        return jnp.broadcast_to(expert_E, weight_LE.shape)
    group_size = num_experts // num_groups
    weight_LGX = weight_LE.reshape(num_layers, num_groups, group_size)
    group_LG, position_LG = pack_in_order(sum_like_torch(weight_LGX), num_nodes)
    first_LG1 = invert(position_LG, group_LG)[:, :, None] * group_size
    inside_11X = jnp.arange(group_size, dtype=jnp.int32)[None, None]
    return (first_LG1 + inside_11X).reshape(num_layers, num_experts)


@jax.jit
def sum_like_torch(value: jax.Array) -> jax.Array:
    """Sums the last axis in the order in which torch 2.13 does on x86-64.

    Two groups whose loads differ only in the last bit may swap places if the order of
    the additions changes, so the order is part of the contract: eight lanes, each with
    four chains of running sums; chains longer than sixteen are summed in stages
    (torch's `cascade_sum`). Fewer than eight values are four chains of scalars.

    Args:
      value: [..., n] float32.

    Returns:
      [...] float32.

    Examples:
      >>> float(sum_like_torch(jnp.arange(10, dtype=jnp.float32)))
      45.0
    """
    size = value.shape[-1]
    whole = size // _LANES * _LANES
    if not whole:
        return _sum_rows([value[..., i] for i in range(size)])
    lanes = _sum_rows([value[..., i : i + _LANES] for i in range(0, whole, _LANES)])
    parts = [value[..., i] for i in range(whole, size)]
    return _sum_in_turn(parts + [lanes[..., i] for i in range(_LANES)])


def _sum_rows(rows: list[jax.Array]) -> jax.Array:
    length = len(rows) // _CHAINS
    chains = [_cascade(rows[i : length * _CHAINS : _CHAINS]) for i in range(_CHAINS)]
    rest = rows[length * _CHAINS :]
    first = [] if chains[0] is None else [chains[0]]
    chains[0] = _sum_in_turn(first + rest)
    return _sum_in_turn([chain for chain in chains if chain is not None])


def _cascade(rows: list[jax.Array]) -> jax.Array | None:
    """Sums one chain: runs of `stride` values, then runs of those sums, and so on."""
    if not rows:
        return None
    power = max(4, (len(rows) - 1).bit_length() // _LEVELS)
    stride = 1 << power
    levels: list[list[jax.Array]] = [[] for _ in range(_LEVELS)]
    for start in range(0, len(rows) - stride + 1, stride):
        carried = _sum_in_turn(rows[start : start + stride])
        for level in range(1, _LEVELS):
            levels[level].append(carried)
            done = start + stride
            if done & ((stride - 1) << (level * power)) or level == _LEVELS - 1:
                break
            carried = _sum_in_turn(levels[level])
            levels[level] = []
    levels[0] = rows[len(rows) // stride * stride :]
    return _sum_in_turn([_sum_in_turn(level) for level in levels if level])


def _sum_in_turn(values: list[jax.Array]) -> jax.Array:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
