"""Times on one accelerator: F&B against F then B, grouped products, a rebalance.

Run: python benchmarks/gpu.py [--quick]

Without a GPU, and with `--quick`, it only shows that it works: sizes are small, and
there are two runs. Rivals run in turn; times are medians of wall time until the result
is ready.
"""

import argparse
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax.backward import SplitBackward
from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig
from eplb_jax import grouped_matmul, rebalance_experts


def race(runs, rivals):
    """Returns the median seconds of several jitted functions and their arguments."""
    times = {name: [] for name in rivals}
    for run in range(runs + 1):
        for name, (function, *args) in rivals.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            if run:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def report(title, times):
    """Prints the times of a race, each over the first."""
    print(f"\n{title}")
    first = next(iter(times.values()))
    for name, seconds in times.items():
        print(f"  {name:28} {1e3 * seconds:10.3f} ms   {seconds / first:6.3f} x")


def pair(quick):
    """A stage of one layer of DeepSeek-V3's widths, with as many experts as fit."""
    scale = 16 if quick else 1
    arch = DeepSeekConfig(
        vocab_size=64,
        hidden_size=7168 // scale,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        intermediate_size=64,
        num_attention_heads=128 // scale,
        q_lora_rank=1536 // scale,
        kv_lora_rank=512 // scale,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=16,
        moe_intermediate_size=2048 // scale,
        num_experts_per_tok=8,
        n_shared_experts=1,
    )
    model = DeepSeek(
        architecture=arch, compute_dtype="bfloat16", remat=("attention",)
    ).build_unpipelined()
    params = jax.jit(
        lambda key: model.prepare_params(model.init(key), model.init_buffers()).stages
    )(jax.random.key(0))
    stage = jax.tree.map(lambda leaf: leaf[0], params)
    tokens = 256 if quick else 4096
    x = jax.random.normal(
        jax.random.key(1), (1, tokens, arch.hidden_size), jnp.bfloat16
    )
    plan = SplitBackward.trace(
        model.stage, stage, x, has_aux=True, platform=_platform()
    )
    residuals = jax.jit(plan.forward)(stage, x)[1]

    @jax.jit
    def together(x, residuals, dy):
        return plan.forward_and_backward((stage, x), (stage, residuals, dy))

    forward = jax.jit(lambda x: plan.forward(stage, x))
    backward = jax.jit(lambda residuals, dy: plan.backward(stage, residuals, dy))

    def in_turn(x, residuals, dy):
        return forward(x), backward(residuals, dy)

    return {"F, then B": (in_turn, x, residuals, x), "F&B": (together, x, residuals, x)}


def products(quick):
    """Grouped products, forward and backward, against one dense product of the rows."""
    rows, groups, d, f = (1024, 4, 128, 256) if quick else (32768, 4, 7168, 2048)
    x = jax.random.normal(jax.random.key(0), (rows, d), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (groups, d, f), jnp.bfloat16)
    parts = np.ones(groups) / groups
    sizes = jnp.asarray(np.random.default_rng(0).multinomial(rows, parts), jnp.int32)

    def gradient(product):
        def loss(x, weight):
            return jnp.square(product(x, weight).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    dense = gradient(lambda x, w: x @ w[0])
    ours = gradient(lambda x, w: grouped_matmul(x, w, sizes))
    xla = gradient(lambda x, w: jax.lax.ragged_dot(x, w, sizes))
    return {
        "one dense product": (dense, x, weight),
        "grouped_matmul": (ours, x, weight),
        "jax.lax.ragged_dot": (xla, x, weight),
    }


def rebalances(quick):
    """Placements for all layers of DeepSeek-V3, 320 physical experts on 64 devices."""
    layers = 4 if quick else 58
    loads = jax.random.gamma(jax.random.key(0), 1.0, (layers, 256))

    def plan(policy):
        return jax.jit(
            lambda loads: rebalance_experts(loads, 320, 8, 8, 64, policy=policy)
        )

    return {name: (plan(name), loads) for name in ("hierarchical", "global")}


def _platform():
    return "cuda" if jax.default_backend() == "gpu" else jax.default_backend()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two runs")
    args = parser.parse_args()
    quick = args.quick or jax.default_backend() != "gpu"
    runs = 2 if quick else 20
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )
    report("F&B against F then B, one layer", race(runs, pair(quick)))
    report("grouped products, forward and backward", race(runs, products(quick)))
    report("rebalance, all layers", race(runs, rebalances(quick)))


if __name__ == "__main__":
    main()
