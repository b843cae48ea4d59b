"""The cost of the MoE layer's parts on CPU, and how placements affect its buffers.

Run: JAX_PLATFORMS=cpu python benchmarks/moe.py [--quick]

Times are medians of the process's CPU time; the rivals run in turn.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from eplb_jax import ExpertTables, rebalance_experts
from eplb_jax.layer.replicas import balanced_shares
from eplb_jax.products.grouped import grouped_matmul, num_block_rows

LOADS = Path(__file__).parent.parent / "tests/data/eplb_loads_deepseek_v3.npz"
DEVICES, PHYSICAL = 32, 288


def cpu_seconds(fn, *args):
    start = time.process_time()
    jax.block_until_ready(fn(*args))
    return time.process_time() - start


def even_sizes(rows, groups):
    """Group sizes if every row picks a group at random."""
    parts = np.ones(groups) / groups
    sizes = np.random.default_rng(0).multinomial(rows, parts)
    return jnp.asarray(sizes, jnp.int32)


def time_products(runs, rows=4096, groups=32, d=512, f=1024):
    """Forward and backward of ours, of XLA's, and of one dense product."""
    x = jax.random.normal(jax.random.key(0), (rows, d))
    weight = jax.random.normal(jax.random.key(1), (groups, d, f)) / d**0.5
    sizes = even_sizes(rows, groups)

    def gradient(product):
        def loss(x, weight):
            return jnp.sin(product(x, weight)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    rivals = {
        "grouped_matmul": gradient(lambda x, w: grouped_matmul(x, w, sizes)),
        "jax.lax.ragged_dot": gradient(lambda x, w: jax.lax.ragged_dot(x, w, sizes)),
        "one dense matrix": gradient(lambda x, w: x @ w[0]),
    }
    times = {name: [] for name in rivals}
    for run in range(runs + 1):
        for name, fn in rivals.items():
            seconds = cpu_seconds(fn, x, weight)
            if run:  # the first one compiles
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def buffers():
    """Largest over mean device load, by placement and replica choice: [layers]."""
    with np.load(LOADS) as file:
        planned, came = file["prefill_in1024"][3:], file["prefill_in2048"][3:]
    in_order = np.tile(np.arange(256, dtype=np.int32), (len(came), 1))
    fresh = rebalance_experts(came, PHYSICAL, 1, 1, DEVICES, policy="global")[0]
    stale = rebalance_experts(planned, PHYSICAL, 1, 1, DEVICES, policy="global")[0]
    swaps = rebalance_experts(planned, PHYSICAL, 1, 1, DEVICES, policy="swaps")[0]

    def largest(placement, is_balanced):
        maps = ExpertTables.from_placement(placement, 256, 33)
        even = came[..., None] / np.asarray(maps.expert_count)[..., None]
        replicas = np.asarray(maps.logical_to_physical_map)
        shares = np.broadcast_to(even, replicas.shape)
        if is_balanced:
            share = jax.vmap(lambda c, t: balanced_shares(c, t, DEVICES))
            shares = np.asarray(jax.jit(share)(came, maps))
        per_device = placement.shape[1] // DEVICES
        loads = np.zeros((len(came), DEVICES))
        layer = np.broadcast_to(np.arange(len(came))[:, None, None], replicas.shape)
        used = replicas >= 0
        np.add.at(loads, (layer[used], replicas[used] // per_device), shares[used])
        return loads.max(axis=1) / loads.mean(axis=1)

    return {
        "experts in order, no replicas": largest(in_order, False),
        "plan for other loads, spread": largest(stale, False),
        "plan for other loads, balanced": largest(stale, True),
        "swaps for other loads, balanced": largest(swaps, True),
        "plan for these loads, spread": largest(fresh, False),
        "plan for these loads, balanced": largest(fresh, True),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of each")
    args = parser.parse_args()
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores"
    )
    print("\n4096 rows, 32 groups, 512 x 1024, forward and backward, CPU seconds")
    times = time_products(1 if args.quick else 5)
    for name, seconds in times.items():
        ratio = seconds / times["grouped_matmul"]
        print(f"  {name:20} {seconds:7.3f}   {ratio:5.1f} x ours")
    print("\nrows multiplied / rows, 4096 tokens, 64 experts")
    for top_k in (1, 8):
        sizes = even_sizes(4096 * top_k, 64)
        print(f"  top_k={top_k}: {int(num_block_rows(sizes)) / (4096 * top_k):.3f}")
    print(
        "\nbuffer for no overflow / mean load, recorded prefill loads, "
        f"{PHYSICAL} physical experts on {DEVICES} devices: mean and worst of 58 layers"
    )
    for name, ratio in buffers().items():
        print(f"  {name:32} {ratio.mean():.3f}  {ratio.max():.3f}")


if __name__ == "__main__":
    main()
