"""Exact balance on recorded loads: how even, what is fetched, how long a plan takes.

Run: JAX_PLATFORMS=cpu python benchmarks/exact_balance.py [--quick] [--figure FILE]

All 58 layers with experts of all recordings, 32,768 rows a device.
"""

import argparse
import functools
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax.configs.deepseek_v3 import architecture
from dualpipe_jax.gpu import GPUS
from dualpipe_jax.gpu.overlap import KERNEL_LATENCY_S
from eplb_jax import ExpertTables, plan_microbatch, rebalance_experts, style

LOADS = Path(__file__).parent.parent / "tests/data/eplb_loads_deepseek_v3.npz"
ROWS = 32768
# Each after the one that a placement for it could have been planned from.
WINDOWS = (
    ("prefill_in512", "prefill_in1024"),
    ("prefill_in1024", "prefill_in2048"),
    ("prefill_in1000out1000", "prefill_in2000out100"),
    ("prefill_in2000out100", "prefill_in1800out100"),
)


def read():
    with np.load(LOADS) as file:
        return {name: file[name][3:] for name in file}


def counts_of(loads, devices):
    """[layers, devices, experts]: rows in proportion to the loads, from all alike."""
    counts = []
    for load in loads:
        share = load * (devices * ROWS / load.sum())
        total = np.floor(share).astype(int)
        rest = devices * ROWS - total.sum()
        total[np.argsort(total - share, kind="stable")[:rest]] += 1
        extra = np.arange(devices)[:, None] < total % devices
        counts.append(total // devices + extra)
    return np.array(counts, np.int32)


@functools.partial(
    jax.jit, static_argnames=("num_fetched", "num_nodes", "slack", "has_shared")
)
def plans(counts, tables, num_fetched, num_nodes=1, slack=0.0, has_shared=False):
    def one(of_layer):
        counts, tables = of_layer
        devices, per_device = len(counts), len(tables.physical_to_logical_map)
        # Each token has eight choices, and the shared expert.
        plan = plan_microbatch(
            counts,
            tables,
            num_fetched=num_fetched,
            num_nodes=num_nodes,
            slack=slack,
            shared=jnp.full(devices, ROWS // 8) if has_shared else None,
        )
        mean = ROWS + has_shared * (ROWS // 8)
        per_device //= devices
        is_fetched = plan.fetched >= 0
        node = jnp.arange(devices) // (devices // num_nodes)
        is_far = plan.source // per_device // (devices // num_nodes) != node[:, None]
        return (
            plan.device_rows.max() / mean,
            is_fetched.sum() / devices,
            is_fetched.sum(axis=1).max(),
            (is_fetched & is_far).sum() / devices,
        )

    return jax.lax.map(one, (counts, tables))


def in_order(layers):
    placement = np.tile(np.arange(256, dtype=np.int32), (layers, 1))
    return ExpertTables.from_placement(placement, 256)


def home(counts):
    """The fullest device over the mean if each expert is computed at home."""
    devices = counts.shape[1]
    load = counts.sum(axis=1).reshape(len(counts), devices, -1).sum(axis=2)
    return load.max(axis=1) / ROWS


def show(name, most, fetched, largest, far):
    most, fetched = np.asarray(most), np.asarray(fetched)
    print(
        f"  {name:44} {(most <= 1).mean():7.2%} {most.max():7.4f} "
        f"{fetched.mean():8.2f} {int(np.max(largest)):5} {np.mean(far):8.2f}"
    )


def plan_time(devices, num_fetched, physical, runs):
    """Seconds of one jitted plan, 256 experts: the median, and the fastest."""
    loads = read()["prefill_in2048"]
    counts = jnp.asarray(counts_of(loads[30:31], devices)[0])
    tables = in_order(1).layer(0)
    if physical > 256:
        maps = rebalance_experts(
            loads[30:31], physical, 1, 1, devices, max_replicas=devices
        )
        tables = ExpertTables(*maps).layer(0)
    plan = jax.jit(functools.partial(plan_microbatch, num_fetched=num_fetched))
    jax.block_until_ready(plan(counts, tables))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(plan(counts, tables))
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times)


# One F&B pair of `profiles:training` on H800s: results/profiles_2026-11-23.md.
PAIR_LAYERS, PAIR_COMPUTE, PAIR_SENT = 4, 0.1864, 0.1161


def pair_seconds(fullest, fetched, *, devices=64, efficiency=0.7):
    """An F&B pair whose fullest device has `fullest` times the mean of the rows.

    It computes, or sends, whichever takes longer. The report's pair multiplies buffers
    of 1.25 times the mean; products of the experts follow the rows, the rest does not.
    A device fetches `fetched` experts a layer, in F and in B, and gradients go home.
    """
    sizes, gpu = architecture(), GPUS["h800"]
    expert = 3 * sizes.hidden_size * sizes.moe_intermediate_size
    products = PAIR_LAYERS * 3 * 2 * expert * ROWS / (gpu.bf16_flops * efficiency)
    plans = PAIR_LAYERS * 110 * KERNEL_LATENCY_S * (fetched > 0)
    compute = PAIR_COMPUTE + products * (fullest - 1.25) + plans
    network = gpu.network_bandwidth / (1 - 8 / devices)
    sent = PAIR_SENT * fullest + PAIR_LAYERS * 3 * 2 * expert * fetched / network
    return np.maximum(compute, sent)


def step_times(recorded):
    """Mean over layers and windows, relative to a router that is even."""
    devices, even = 64, pair_seconds(1.0, 0.0)
    found = {"experts in order": [], "placed for the window before": [], "exact": []}
    for before, now in WINDOWS:
        if not {before, now} <= set(recorded):
            continue
        counts = counts_of(recorded[now], devices)
        found["experts in order"].append((home(counts), np.zeros(len(counts))))
        tables = ExpertTables(*rebalance_experts(recorded[before], 320, 1, 1, devices))
        # Each replica has an equal part of its expert's rows.
        expert = np.asarray(tables.physical_to_logical_map)
        part = counts.sum(axis=1) / np.asarray(tables.expert_count)
        load = np.take_along_axis(part, expert, axis=1)
        load = load.reshape(len(counts), devices, -1).sum(axis=2)
        placed = load.max(axis=1) / ROWS, np.zeros(len(counts))
        found["placed for the window before"].append(placed)
        most, fetched, *_ = plans(counts, tables, 1, has_shared=True)
        found["exact"].append((np.asarray(most), np.maximum(fetched, 1 / devices)))
    for name, parts in found.items():
        most, fetched = (np.concatenate(column) for column in zip(*parts, strict=True))
        times = pair_seconds(most, fetched).mean() / even
        print(f"  {name:44} {most.mean():7.3f} {times:7.3f}")


def draw(path, layer=30, before="prefill_in1024", now="prefill_in2048"):
    """Rows of 32 devices: experts in order, placed for the window before, planned."""
    loads = read()
    counts = counts_of(loads[now][layer : layer + 1], 32)[0]
    at_home = counts.sum(axis=0).reshape(32, -1).sum(axis=1) / ROWS
    maps = rebalance_experts(loads[before][layer : layer + 1], 288, 1, 1, 32)
    tables = ExpertTables(*maps).layer(0)
    placed = np.asarray(
        plan_microbatch(counts, tables, num_fetched=0, slack=9.0).device_rows
    )
    plan = plan_microbatch(counts, tables, num_fetched=8)
    figure = style.figure(9, 2.9)
    (axes,) = style.axes(figure, grid="y")
    device = np.arange(32)
    for i, (rows, label) in enumerate(
        (
            (at_home, "experts in order"),
            (placed / ROWS, "placed for the window before"),
            (np.asarray(plan.device_rows) / ROWS, "and planned for this microbatch"),
        )
    ):
        axes.bar(
            device + 0.27 * (i - 1), rows, 0.25, color=style.distinct(i), label=label
        )
    axes.set_xlabel("device")
    axes.set_ylabel("rows / mean")
    style.legend(axes, loc="upper right")
    count = int((np.asarray(plan.fetched) >= 0).sum())
    style.heading(
        figure,
        f"Rows of the devices, layer {layer + 3}: at most {at_home.max():.2f}, "
        f"{placed.max() / ROWS:.2f} and {plan.device_rows.max() / ROWS:.2f} of the "
        f"mean; {count} experts fetched",
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one recording of each")
    parser.add_argument("--figure", type=Path, help="only draw the rows of the devices")
    args = parser.parse_args()
    if args.figure:
        draw(args.figure)
        return
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores"
    )
    recorded = read()
    if args.quick:
        recorded = {
            name: recorded[name] for name in ("prefill_in1024", "prefill_in2048")
        }

    print("\nfullest device / mean, without a plan: mean, worst layer")
    for devices in (8, 32, 64):
        most = home(np.concatenate([counts_of(v, devices) for v in recorded.values()]))
        print(
            f"  {devices:2} devices, experts in order "
            f"{most.mean():27.2f} {most.max():7.2f}"
        )

    print(
        f"\n{'with a plan':46} {'layers':>7} {'fullest':>7} {'fetched':>8}"
        f"\n{'':46} {'even':>7} {'/ mean':>7} {'/ device':>8} {'most':>5} {'far':>8}"
    )
    for devices, num_fetched, num_nodes in (
        (8, 8, 1),
        (32, 8, 1),
        (64, 4, 1),
        (64, 4, 8),
    ):
        counts = np.concatenate([counts_of(v, devices) for v in recorded.values()])
        name = f"{devices} devices, num_fetched={num_fetched}, {num_nodes} nodes"
        show(name, *plans(counts, in_order(len(counts)), num_fetched, num_nodes))
    for num_fetched in (1, 2, 3):
        counts = np.concatenate([counts_of(v, 32) for v in recorded.values()])
        name = f"32 devices, num_fetched={num_fetched}"
        show(name, *plans(counts, in_order(len(counts)), num_fetched))

    for devices, num_fetched in ((32, 8), (32, 2), (64, 4)):
        counts = np.concatenate([counts_of(v, devices) for v in recorded.values()])
        tables = in_order(len(counts))
        name = f"{devices} devices, num_fetched={num_fetched}, shared rows planned"
        show(name, *plans(counts, tables, num_fetched, has_shared=True))

    print("\n288 physical experts on 32 devices, placed for the window before")
    windows = [pair for pair in WINDOWS if set(pair) <= set(recorded)]
    for policy, nodes in (("global", 1), ("hierarchical", 4)):
        for slack, has_shared in ((0.0, False), (0.02, False), (0.0, True)):
            results = []
            for before, now in windows:
                groups = 8 if policy == "hierarchical" else 1
                maps = rebalance_experts(
                    recorded[before], 288, groups, nodes, 32, policy=policy
                )
                counts = counts_of(recorded[now], 32)
                tables = ExpertTables(*maps)
                results.append(plans(counts, tables, 8, 1, slack, has_shared))
            name = f"policy={policy!r}, {slack=}" + has_shared * ", shared rows"
            show(
                name, *(np.concatenate(column) for column in zip(*results, strict=True))
            )

    print(
        "\nF&B pair of the training profile, estimated, 320 physical experts: fullest "
        "device / mean, time / even router's"
    )
    step_times(recorded)

    print("\nmilliseconds of a plan, 256 experts: median, fastest")
    runs = 20 if args.quick else 200
    for devices, num_fetched, physical in ((64, 4, 256), (32, 8, 288), (64, 4, 320)):
        median, fastest = plan_time(devices, num_fetched, physical, runs)
        print(
            f"  {devices} devices, num_fetched={num_fetched}, {physical} physical "
            f"{1e3 * median:7.3f} {1e3 * fastest:7.3f}"
        )


if __name__ == "__main__":
    main()
