"""EPLB: the time of a plan beside a plain NumPy port's, and the quality of plans.

Run: JAX_PLATFORMS=cpu python benchmarks/eplb.py [--quick] [--upstream PATH]

`--upstream` names a checkout of deepseek-ai/EPLB, whose program then runs in the same
process as one more rival; that needs torch. Ratios are medians over pairs of runs, one
after the other, so that a busy machine slows both. Times are medians of wall time and,
in brackets, of CPU time over all threads. Loads of 58 layers were recorded from
DeepSeek-V3 (tests/data); others are lognormal with a fixed seed. JAX_PLATFORMS=cuda
runs our part on a GPU; the time then includes the launch but not the copy back.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import eplb_numpy
import jax
import numpy as np

from eplb_jax import rebalance_experts, refine_placement
from eplb_jax.placement.quality import (
    balancedness,
    balancedness_bound,
    count_duplicates,
    count_moves,
    remote_share,
)
from eplb_jax.placement.soft import home_nodes

LOADS = Path(__file__).parent.parent / "tests" / "data" / "eplb_loads_deepseek_v3.npz"
DENSE = 3  # the first layers have no experts
# (layers, experts), (num_replicas, num_groups, num_nodes, num_gpus), and upstream's
# time on two cores of another machine, ms (torch 2.13), which is not measured here.
SHAPES = (
    ((58, 256), (288, 8, 4, 32), 317),
    ((58, 256), (288, 1, 18, 144), 1741),
    ((61, 384), (448, 1, 8, 64), 1913),
    ((96, 1024), (1280, 1, 40, 320), 36600),
)
WINDOW = "prefill_in2048"
# Width of the narrow map: replicas per expert. The loads here need fewer.
MAX_REPLICAS = 48


def recorded(window):
    with np.load(LOADS) as file:
        return file[window][DENSE:].astype(np.float32)


def loads_of(shape):
    weight = recorded(WINDOW)
    if weight.shape == shape:
        return weight
    return np.random.default_rng(0).lognormal(0, 1, shape).astype(np.float32)


def seconds(fn, *args):
    """Returns (wall, CPU) seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - wall, time.process_time() - cpu


def milliseconds(times):
    wall, cpu = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return f"{wall:8.2f} [{cpu:8.2f}] ms"


def compiled(shape, sizes, **options):
    """Returns the compiled program, and the seconds that tracing and compiling took."""
    weight = jax.ShapeDtypeStruct(shape, np.float32)
    fn = jax.jit(lambda weight: rebalance_experts(weight, *sizes, **options))
    start = time.perf_counter()
    program = fn.lower(weight).compile()
    return program, time.perf_counter() - start


def is_equal(maps, expected):
    width = min(maps[1].shape[-1], expected[1].shape[-1])
    pairs = zip(
        (maps[0], maps[1][..., :width], maps[2]),
        (expected[0], expected[1][..., :width], expected[2]),
        strict=True,
    )
    return all(np.array_equal(one, other) for one, other in pairs)


def upstream_program(path):
    """Imports deepseek-ai/EPLB's own function; exits and tells how, if it cannot."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit("--upstream runs a torch program: python -m pip install torch first.")
    sys.path.insert(0, str(path))
    try:
        import eplb  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit(f"{path} has no eplb.py: clone github.com/deepseek-ai/EPLB there.")
    unstable = torch.Tensor.sort

    def stable(self, dim, descending):
        return unstable(self, dim=dim, descending=descending, stable=True)

    # Its maps depend on how the sort breaks ties: only a stable one, as in the golden
    # data, gives comparable maps.
    torch.Tensor.sort = stable
    return lambda weight, *sizes: eplb.rebalance_experts(torch.tensor(weight), *sizes)


def time_rebalance(runs, upstream):
    print("\nrebalance, jitted; wall [CPU]; ratios to the rival in this process")
    for shape, sizes, elsewhere in SHAPES:
        weight = loads_of(shape)
        program, compile_s = compiled(shape, sizes, max_replicas=MAX_REPLICAS)
        wide, _ = compiled(shape, sizes)
        on_device = jax.device_put(weight)
        rivals = {"NumPy port": eplb_numpy.rebalance_experts}
        if upstream:
            rivals["upstream"] = upstream
        for fn in (program, wide):
            seconds(fn, on_device)
        maps = [np.asarray(array) for array in program(on_device)]
        print(
            f"  {shape[0]}x{shape[1]} -> {sizes[0]} on {sizes[3]} GPUs, "
            f"{'hierarchical' if sizes[1] > 1 else 'global'}; "
            f"compiled in {compile_s:.1f} s"
        )
        ours, full, theirs = [], [], {name: [] for name in rivals}
        for _ in range(runs):
            # One plan is too short for a busy machine's clock: a run is the median of
            # eleven.
            for times, fn in ((ours, program), (full, wide)):
                several = sorted(seconds(fn, on_device) for _ in range(11))
                times.append(several[len(several) // 2])
            for name, rival in rivals.items():
                theirs[name].append(seconds(rival, weight, *sizes))
        print(f"    ours                        {milliseconds(ours)}")
        print(f"    ours, widest second map     {milliseconds(full)}")
        for name, times in theirs.items():
            pairs = zip(times, ours, strict=True)
            ratio = statistics.median(other[0] / own[0] for other, own in pairs)
            print(f"    {name:27} {milliseconds(times)}   {ratio:6.0f} x", end="")
            expected = [np.asarray(array) for array in rivals[name](weight, *sizes)]
            print("  equal maps" if is_equal(maps, expected) else "  DIFFERENT MAPS")
        print(f"    upstream, on another machine {elsewhere:7} ms", flush=True)


def quality_of_policies(runs):
    num_replicas, num_nodes, num_devices = 288, 4, 32
    sizes = (num_replicas, 8, num_nodes, num_devices)
    print(f"\npolicies, 58x256 -> {num_replicas} on {num_devices} GPUs, 4 nodes")
    print("  balancedness mean and worst layer; load served off its home node; experts")
    print("  twice on a GPU, in all layers")
    for window in (WINDOW, "prefill_in2000out100"):
        weight = recorded(window)
        bound = np.asarray(balancedness_bound(weight, num_replicas, num_devices))
        home = home_nodes(weight, 8, num_nodes)
        print(f"  {window}: no placement exceeds {bound.mean():.4f}")
        for policy in ("hierarchical", "soft", "global", "swaps"):
            program, compile_s = compiled(
                weight.shape, sizes, policy=policy, max_replicas=MAX_REPLICAS
            )
            placement = program(weight)[0]
            score = np.asarray(balancedness(weight, placement, num_devices))
            away = np.asarray(remote_share(weight, placement, home, num_nodes))
            twice = int(np.asarray(count_duplicates(placement, num_devices)).sum())
            times = [seconds(program, weight) for _ in range(runs)]
            print(
                f"    {policy:12} {score.mean():.4f} {score.min():.4f}  "
                f"away {away.mean():6.1%}  twice {twice:3}  {milliseconds(times)}  "
                f"compiled in {compile_s:.1f} s",
                flush=True,
            )


def quality_of_refining(runs):
    before, after = recorded("prefill_in1024"), recorded("prefill_in2048")
    num_replicas, num_devices, budget = 288, 32, 48
    old = rebalance_experts(before, num_replicas, 1, 1, num_devices)[0]
    fresh = rebalance_experts(after, num_replicas, 1, 1, num_devices)[0]
    refine = jax.jit(lambda w, p: refine_placement(w, p, num_devices, max_moves=budget))
    start = time.perf_counter()
    program = refine.lower(after, old).compile()
    compile_s = time.perf_counter() - start
    refined, _ = program(after, old)
    print(f"\nrefine, from the plan for prefill_in1024 to {WINDOW}, {budget} moves")
    for name, placement in (
        ("old plan", old),
        ("upstream's fresh plan", fresh),
        ("refined", refined),
    ):
        score = np.asarray(balancedness(after, placement, num_devices))
        moves = np.asarray(count_moves(old, placement, num_devices))
        moved = moves.mean() / num_replicas
        twice = int(np.asarray(count_duplicates(placement, num_devices)).sum())
        print(
            f"  {name:22} balancedness {score.mean():.4f} {score.min():.4f}  "
            f"moved {moved:6.1%}  twice {twice:3}"
        )
    times = [seconds(program, after, old) for _ in range(runs)]
    print(f"  time {milliseconds(times)}, compiled in {compile_s:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument(
        "--upstream", type=Path, help="a checkout of github.com/deepseek-ai/EPLB"
    )
    args = parser.parse_args()
    upstream = upstream_program(args.upstream) if args.upstream else None
    runs = 1 if args.quick else 5
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, NumPy "
        f"{np.__version__}, {os.cpu_count()} cores, {device.device_kind}"
    )
    time_rebalance(runs, upstream)
    quality_of_policies(runs)
    quality_of_refining(runs)


if __name__ == "__main__":
    main()
