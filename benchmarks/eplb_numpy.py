"""EPLB in plain NumPy, one item at a time: a baseline for benchmarks, and an oracle.

A port of `deepseek-ai/EPLB@5791971 eplb.py` that fixes the order of ties, which
upstream leaves to an unstable sort: stable descending, the lowest index first. It is
written to be read and shares no code with eplb_jax.
"""

import numpy as np


def sum_as_torch_does(values):
    """Sums a vector in float32, in the order of torch 2.13 on x86-64.

    There are eight lanes with four chains each. A chain adds up runs of 16 (longer
    runs in long chains), and then the sums of the runs. The chains of each lane are
    added up, then the values left over beside the lanes, then the lanes. Fewer than
    eight values are chains of scalars.
    """
    values = np.asarray(values, np.float32)
    if len(values) < 8:
        return _four_chains(values[:, None])[0]
    whole = len(values) // 8 * 8
    lanes = _four_chains(values[:whole].reshape(-1, 8))
    total = np.float32(0)
    for value in [*values[whole:], *lanes]:
        total += value
    return total


def _four_chains(rows):
    """Sums rows [n, lanes]; row i is in chain i % 4, except up to three at the end."""
    length = len(rows) // 4
    power = max(4, (length - 1).bit_length() // 4 if length else 0)
    chains = np.zeros((4, rows.shape[1]), np.float32)
    for chain in range(4):
        levels = np.zeros((4, rows.shape[1]), np.float32)
        i = 0
        while i + (1 << power) <= length:
            for _ in range(1 << power):
                levels[0] += rows[4 * i + chain]
                i += 1
            for level in range(1, 4):
                levels[level] += levels[level - 1]
                levels[level - 1] = 0
                if i & (((1 << power) - 1) << (level * power)):
                    break
        while i < length:
            levels[0] += rows[4 * i + chain]
            i += 1
        for level in range(1, 4):
            levels[0] += levels[level]
        chains[chain] = levels[0]
    for row in rows[4 * length :]:
        chains[0] += row
    for chain in range(1, 4):
        chains[0] += chains[chain]
    return chains[0]


def balanced_packing(weight, num_packs):
    num_rows, num_items = weight.shape
    per_pack = num_items // num_packs
    pack_index = np.tile(np.arange(num_items), (num_rows, 1))
    rank_in_pack = np.zeros((num_rows, num_items), int)
    if per_pack == 1:
        return pack_index, rank_in_pack
    for row in range(num_rows):
        load = np.zeros(num_packs, np.float32)
        filled = np.zeros(num_packs, int)
        for item in np.argsort(-weight[row], kind="stable"):
            pack = np.where(filled < per_pack, load, np.inf).argmin()
            pack_index[row, item], rank_in_pack[row, item] = pack, filled[pack]
            load[pack] += weight[row, item]
            filled[pack] += 1
    return pack_index, rank_in_pack


def replicate_experts(weight, num_phy):
    num_rows, num_log = weight.shape
    phy2log = np.tile(np.arange(num_phy), (num_rows, 1))
    rank = np.zeros((num_rows, num_phy), int)
    count = np.ones((num_rows, num_log), np.int64)
    rows = np.arange(num_rows)
    for i in range(num_log, num_phy):
        expert = (weight / count.astype(np.float32)).argmax(axis=1)
        phy2log[:, i], rank[:, i] = expert, count[rows, expert]
        count[rows, expert] += 1
    return phy2log, rank, count


def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus):
    weight = np.asarray(weight, np.float32)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_layers, num_experts = weight.shape
    group_size, per_node = num_experts // num_groups, num_experts // num_nodes
    replicas_per_node = num_replicas // num_nodes
    replicas_per_gpu = num_replicas // num_gpus

    by_group = weight.reshape(num_layers, num_groups, group_size)
    group_load = np.array([[sum_as_torch_does(g) for g in layer] for layer in by_group])
    node, place = balanced_packing(group_load, num_nodes)
    first = (node * (num_groups // num_nodes) + place) * group_size
    position = (first[:, :, None] + np.arange(group_size)).reshape(num_layers, -1)
    expert_at = np.argsort(position, axis=1)

    by_node = np.take_along_axis(weight, expert_at, 1).reshape(-1, per_node)
    replica, rank, count = replicate_experts(by_node, replicas_per_node)
    load = np.take_along_axis(by_node / count.astype(np.float32), replica, 1)
    gpu, place = balanced_packing(load, num_gpus // num_nodes)
    item_at = np.argsort(gpu * replicas_per_gpu + place, axis=1)
    replica = np.take_along_axis(replica, item_at, 1).reshape(num_layers, num_nodes, -1)
    replica = replica + per_node * np.arange(num_nodes)[:, None]
    phy2log = np.take_along_axis(expert_at, replica.reshape(num_layers, -1), 1)
    rank = np.take_along_axis(rank, item_at, 1).reshape(num_layers, -1)
    count = np.take_along_axis(count.reshape(num_layers, -1), position, 1)

    log2phy = np.full((num_layers, num_experts, count.max()), -1)
    for layer in range(num_layers):
        log2phy[layer, phy2log[layer], rank[layer]] = np.arange(num_replicas)
    return phy2log, log2phy, count
