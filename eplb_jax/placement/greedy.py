"""EPLB's own two policies, hierarchical and global, as one jitted function.

`deepseek-ai/EPLB@5791971 eplb.py`, `rebalance_experts_hierarchical`: pack groups
of experts to nodes, replicate experts within a node, pack the replicas to GPUs.
The global policy is the same with one group and one node.

Shape suffixes: L layers, E experts, G expert groups, R rows (layers times nodes),
N replicas of a row, P slots of a layer.
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
    num_gpus: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Upstream's hierarchical policy, bit for bit; with one group and node, global.

    Args:
      weight_LE: [layers, experts] float32 loads.
      num_replicas: slots of a layer; a multiple of `num_gpus`.
      num_groups: groups of experts; a multiple of `num_nodes`.
      num_nodes: nodes.
      num_gpus: GPUs; a multiple of `num_nodes`.

    Returns:
      expert: [layers, num_replicas] int32, the expert in each slot.
      rank: [layers, num_replicas] int32, which of its replicas that is.
      count: [layers, experts] int32, replicas of each expert.

    Examples:
      >>> import jax.numpy as jnp
      >>> weight = jnp.array([[8.0, 1.0, 3.0, 2.0]])
      >>> expert, rank, count = greedy_placement(weight, 6, 2, 2, 2)
      >>> expert.tolist(), rank.tolist(), count.tolist()
      ([[0, 0, 1, 3, 2, 2]], [[0, 1, 0, 0, 0, 1]], [[2, 1, 2, 1]])
    """
    num_layers, num_experts = weight_LE.shape
    per_node = num_experts // num_nodes
    # Step 1: pack groups to nodes. With a group a node, upstream keeps their order.
    order_LE = None
    weight_RE = weight_LE
    if num_groups != num_nodes:
        order_LE = experts_by_node(weight_LE, num_groups, num_nodes)
        weight_RE = take_rows(weight_LE, order_LE)
    weight_RE = weight_RE.reshape(num_layers * num_nodes, per_node)

    # Step 2: replicate experts within their node.
    replica_RN, rank_RN, count_RE = replicate_experts(
        weight_RE, num_replicas // num_nodes
    )

    # Step 3: pack replicas to the GPUs of the node.
    load_RN = take_rows(divide(weight_RE, count_RE), replica_RN)
    item_RN, slot_RN = pack_in_order(load_RN, num_gpus // num_nodes)
    item_RN = invert(slot_RN, item_RN)
    rank_LP = take_rows(rank_RN, item_RN).reshape(num_layers, num_replicas)
    expert_LNP = take_rows(replica_RN, item_RN).reshape(num_layers, num_nodes, -1)
    first_1N1 = per_node * jnp.arange(num_nodes, dtype=jnp.int32)[None, :, None]
    expert_LP = (expert_LNP + first_1N1).reshape(num_layers, num_replicas)
    count_LE = count_RE.reshape(num_layers, num_experts)
    if order_LE is not None:
        expert_LP = take_rows(order_LE, expert_LP)
        count_LE = invert(order_LE, count_LE)
    return expert_LP, rank_LP, count_LE


@functools.partial(jax.jit, static_argnums=(1, 2))
def experts_by_node(weight_LE: jax.Array, num_groups: int, num_nodes: int) -> jax.Array:
    """The experts in the order of the nodes that their groups are packed to.

    Args:
      weight_LE: [layers, experts] float32 loads.
      num_groups: groups of experts, each a run of consecutive experts; a multiple
        of `num_nodes`.
      num_nodes: nodes.

    Returns:
      [layers, experts] int32: first the experts of node 0, then those of node 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> experts_by_node(jnp.array([[1.0, 2, 9, 9, 3, 3, 0, 0]]), 4, 2).tolist()
      [[2, 3, 6, 7, 4, 5, 0, 1]]
    """
    num_layers, num_experts = weight_LE.shape
    if num_groups == num_nodes:  # upstream leaves each group with its own node
        expert_E = jnp.arange(num_experts, dtype=jnp.int32)
        return jnp.broadcast_to(expert_E, weight_LE.shape)
    group_size = num_experts // num_groups
    weight_LGE = weight_LE.reshape(num_layers, num_groups, group_size)
    group_LG, slot_LG = pack_in_order(sum_like_torch(weight_LGE), num_nodes)
    first_LG1 = invert(slot_LG, group_LG)[:, :, None] * group_size
    inside_11E = jnp.arange(group_size, dtype=jnp.int32)[None, None]
    return (first_LG1 + inside_11E).reshape(num_layers, num_experts)


@jax.jit
def sum_like_torch(value: jax.Array) -> jax.Array:
    """Sums the last axis in the order in which torch 2.13 does on x86-64.

    Two groups whose loads differ in the last bit only may change places when the
    order of the additions changes, so the order is part of the contract: eight lanes,
    four chains of running sums in each, chains longer than sixteen summed in stages
    (torch's `cascade_sum`); fewer than eight values are four chains of scalars.

    Args:
      value: [..., n] float32.

    Returns:
      [...] float32.

    Examples:
      >>> import jax.numpy as jnp
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
    """One chain: runs of `stride` are added up, runs of runs again, and so on."""
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
