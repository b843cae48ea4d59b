"""Profiles in the settings of DeepSeek's three, of programs compiled for GPUs.

    python benchmarks/profiles.py [training] [prefill] [decode] [--out FOLDER]

Each config of configs/profiles.py is compiled for its mesh of H800s (prefill: H100s),
without GPUs. `overlap_report` estimates the timeline of XLA's schedule; it is written
as a Chrome trace (NAME.json.gz), and read by the same reader as DeepSeek's own trace,
so that all rows of the table are measured alike. This needs tokamax and the gpu-aot
extra. On two cores each takes about ten minutes, nearly all of it in XLA.
"""

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from dualpipe_jax import compile_overlapped, gpu_mesh, overlap_report, read_trace
from dualpipe_jax.configs import profiles
from dualpipe_jax.gpu.overlap import LoopReport, OverlapReport

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "tests" / "data" / "deepseek_v3_train_trace.json.gz"
# Name -> the GPU, and the part of the program that is profiled.
PROFILES = {
    "training": ("h800", "one F&B pair, 4 MoE layers per chunk, EP64, 4K sequence"),
    "prefill": ("h100", "16 MoE layers, EP32, 16K tokens per GPU in prompts of 4K"),
    "decode": ("h800", "32 layers, EP128, 128 requests per GPU, context 4K"),
}


def profiled(name: str, report: OverlapReport) -> LoopReport:
    """Returns the overlapped pair of a train step, or else the whole step.

    The pair is the guard with the most communication.
    """
    if name != "training":
        return report.steady_state
    guards = [loop for loop in report.loops if loop.kind == "guard"]
    return max(guards, key=lambda loop: loop.communication_s)


def make(name: str, folder: Path) -> dict:
    """Compiles a profile's program, writes its trace, and returns its figures."""
    gpu, what = PROFILES[name]
    config = getattr(profiles, name)()
    started = time.perf_counter()
    mesh = gpu_mesh(gpu, config.mesh_shape)
    compiled = compile_overlapped(config.lower_step(mesh), gpu=gpu)
    report = overlap_report(compiled, gpu=gpu)
    seconds = time.perf_counter() - started
    loop = profiled(name, report)
    path = folder / f"{name}.json.gz"
    trace = json.dumps(report.chrome_trace(loop.name), separators=(",", ":"))
    path.write_bytes(gzip.compress(trace.encode(), mtime=0))
    return {
        "what": what,
        "gpu": gpu,
        "num_gpus": mesh.size,
        "compile_s": round(seconds),
        "memory_gib": round(compiled.memory_analysis().peak_memory_in_bytes / 2**30, 1),
        "collectives": len(loop.collectives),
        "without_gemms": len(loop.without_gemms),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("jax", "jax-cuda12-plugin", "tokamax", "flax")
        },
        **figures(path),
    }


def figures(path: Path) -> dict:
    """Returns what `read_trace` finds in a trace, without kernels and streams."""
    found = read_trace(path).as_json()
    return {
        key: found[key]
        for key in (
            *("span_us", "compute_us", "comm_us", "comm_hidden", "compute_busy"),
            *("phases", "costs_ms"),
        )
    }


def table(folder: Path) -> str:
    """Returns DeepSeek's figures and all that are in the folder, as Markdown."""
    lines = [
        "| | span | compute busy | communication | hidden |",
        "|---|---|---|---|---|",
        row("DeepSeek, training, one F&B pair (ran, 64 H800)", figures(PUBLISHED)),
    ]
    for name in PROFILES:
        path = folder / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            where = f"{found['num_gpus']} {found['gpu'].upper()}"
            title = f"{name}: {found['what']} (compiled, {where})"
            lines.append(row(title, found))
    return "\n".join(lines)


def row(title: str, found: dict) -> str:
    span, comm = found["span_us"] / 1e3, found["comm_us"] / 1e3
    return (
        f"| {title} | {span:.1f} ms | {found['compute_busy']:.1%} | {comm:.1f} ms | "
        f"{found['comm_hidden']:.1%} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(PROFILES))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/profiles"
    )
    args = parser.parse_args()
    if unknown := set(args.names) - set(PROFILES):
        parser.error(f"{sorted(unknown)[0]!r} is unknown; use {', '.join(PROFILES)}.")
    if importlib.util.find_spec("tokamax") is None:
        parser.error("needs tokamax; pip install tokamax 'dualpipe-jax[gpu-aot]'.")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        print(f"{name}: compiling", flush=True)
        found = make(name, args.out)
        (args.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {found['compile_s']} s, {found['memory_gib']} GiB", flush=True)
    print(table(args.out))


if __name__ == "__main__":
    main()
