"""Our planner behind sglang-jax's signature, beside that engine's own loops.

Run: JAX_PLATFORMS=cpu python benchmarks/sglang_jax.py

The loops are restated here from a description; tests use them as an oracle. They are
upstream's EPLB in NumPy: items are packed one by one, each into the least loaded pack
that has room, which a generator over all packs looks for; replicas are added one by
one, for all layers at once. Two changes make their maps comparable with ours: sorts are
stable, and loads are float32, as upstream's.

Times are of whole calls, NumPy in and NumPy out; ratios are medians over pairs of runs,
one after the other, so that a busy machine slows both.
"""

import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from eplb_jax.sglang_jax import rebalance_experts as ours

RUNS, CALLS = 5, 11


def pack(load, num_packs):
    """Packs items [rows, n]; returns each item's pack, and its place there."""
    num_rows, num_items = load.shape
    room = num_items // num_packs
    chosen = np.tile(np.arange(num_items), (num_rows, 1))
    place = np.zeros((num_rows, num_items), np.int64)
    if room == 1:
        return chosen, place
    orders = np.argsort(-load, axis=-1, kind="stable")
    for row in range(num_rows):
        total, filled = [np.float32(0)] * num_packs, [0] * num_packs
        for item in orders[row]:
            free = (each for each in range(num_packs) if filled[each] < room)
            least = min(free, key=total.__getitem__)
            chosen[row, item], place[row, item] = least, filled[least]
            total[least] += load[row, item]
            filled[least] += 1
    return chosen, place


def replicate(load, num_physical):
    """Adds replicas, one after another, of the expert with most load for each."""
    num_rows, num_experts = load.shape
    expert = np.tile(np.arange(num_physical), (num_rows, 1))
    rank = np.zeros((num_rows, num_physical), np.int64)
    count = np.ones((num_rows, num_experts), np.int64)
    rows = np.arange(num_rows)
    for at in range(num_experts, num_physical):
        hottest = np.argmax(load / count.astype(np.float32), axis=-1)
        expert[:, at], rank[:, at] = hottest, count[rows, hottest]
        count[rows, hottest] += 1
    return expert, rank, count


def inverse(order):
    back = np.empty_like(order)
    places = np.tile(np.arange(order.shape[1]), (len(order), 1))
    np.put_along_axis(back, order, places, axis=1)
    return back


def rebalance_experts(
    tokens_per_expert, num_physical, num_local, num_groups, num_nodes, algorithm
):
    load = np.atleast_2d(tokens_per_expert).astype(np.float32)
    num_gpus = num_physical // num_local
    if algorithm == "deepseek":
        num_groups = num_nodes = 1
    num_layers, num_experts = load.shape
    size, per_node = num_experts // num_groups, num_experts // num_nodes

    groups = load.reshape(num_layers, num_groups, size)
    node, place = pack(groups.sum(axis=-1), num_nodes)
    first = (node * (num_groups // num_nodes) + place) * size
    to_middle = (first[..., None] + np.arange(size)).reshape(num_layers, -1)
    of_middle = inverse(to_middle)

    by_node = np.take_along_axis(load, of_middle, axis=-1).reshape(-1, per_node)
    expert, rank, count = replicate(by_node, num_physical // num_nodes)
    each = np.take_along_axis(by_node / count.astype(np.float32), expert, axis=-1)
    gpu, place = pack(each, num_gpus // num_nodes)
    of_place = inverse(gpu * num_local + place)

    middle = np.take_along_axis(expert, of_place, axis=-1)
    middle = middle.reshape(num_layers, num_nodes, -1)
    middle = middle + np.arange(0, num_experts, per_node)[None, :, None]
    physical = np.take_along_axis(of_middle, middle.reshape(num_layers, -1), axis=-1)
    rank = np.take_along_axis(rank, of_place, axis=-1).reshape(num_layers, -1)
    count = np.take_along_axis(count.reshape(num_layers, -1), to_middle, axis=-1)

    width = count.max()
    flat = np.full((num_layers, num_experts * width), -1, np.int64)
    places = np.tile(np.arange(num_physical), (num_layers, 1))
    np.put_along_axis(flat, physical * width + rank, places, axis=-1)
    return physical, flat.reshape(num_layers, num_experts, width), count


def seconds(function, *args):
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def main():
    from eplb import SHAPES, loads_of

    print(f"NumPy {np.__version__}, {os.cpu_count()} cores")
    for shape, (num_replicas, num_groups, num_nodes, num_gpus), _ in SHAPES:
        algorithm = "deepseek_hierarchical" if num_groups > 1 else "deepseek"
        sizes = (num_replicas, num_replicas // num_gpus, num_groups, num_nodes)
        args = (loads_of(shape), *sizes, algorithm)
        maps = ours(*args)
        pairs = []
        for _ in range(RUNS):
            own = statistics.median(seconds(ours, *args) for _ in range(CALLS))
            pairs.append((own, seconds(rebalance_experts, *args)))
        own, loops = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / own for own, theirs in pairs)
        expected = rebalance_experts(*args)
        is_equal = all(map(np.array_equal, maps, expected))
        print(
            f"{shape[0]}x{shape[1]} -> {num_replicas}, {num_gpus} devices, "
            f"{algorithm}: {1e3 * own:.1f} ms, loops {1e3 * loops:.0f} ms, "
            f"{ratio:.0f} x, {'equal' if is_equal else 'DIFFERENT'} maps",
            flush=True,
        )


if __name__ == "__main__":
    main()
