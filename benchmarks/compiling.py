"""What compiling a train step costs: the overlapped program against the compact one.

    python benchmarks/compiling.py                    configs/tiny.py, four minutes
    python benchmarks/compiling.py --config other.py  any config for this machine's CPUs

Both programs are traced, compiled and run in this one process. Times are CPU times of
the process, those of steps medians of steps that take turns.
"""

import argparse
import dataclasses
import os
import platform
import re
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # or nothing would be measured

import jax
import numpy as np

from dualpipe_jax.train import load_config, make_programs

PROGRAMS = {"overlapped": True, "compact": False}


def clock():
    return np.array([time.process_time(), time.perf_counter()])


def build(config):
    """(figures, compiled step, programs) of a config's train step."""
    programs = make_programs(config)
    tokens = programs.abstract_tokens
    start = clock()
    lowered = programs.train_step.lower(programs.abstract_state, tokens, tokens)
    traced = clock()
    compiled = lowered.compile()
    done = clock()
    figures = {
        "StableHLO lines": lowered.as_text().count("\n"),
        "HLO instructions": compiled.as_text().count(" = "),
        "distinct kernels": distinct_kernels(compiled.as_text()),
        "tracing, CPU s": (traced - start)[0],
        "compiling, CPU s": (done - traced)[0],
        "compiling, wall s": (done - traced)[1],
        "temporaries, MB a device": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    return figures, compiled, programs


def distinct_kernels(text):
    """Fused computations that differ; XLA generates code for each of them once."""
    found, lines = {}, None
    for line in text.splitlines():
        head = re.match(r"%?([\w.-]+) .*\{$", line)
        if head:
            lines = found.setdefault(head[1], [])
        elif line.startswith("  ") and lines is not None:
            line = re.sub(r", (metadata|backend_config)=\{.*", "", line)
            lines.append(line)
    called = re.findall(r" fusion\(.*calls=%?([\w.-]+)", text)

    def named_alike(name):
        names = {}
        return re.sub(
            r"%[\w.-]+",
            lambda match: names.setdefault(match[0], f"%{len(names)}"),
            "\n".join(found[name]),
        )

    return len(set(map(named_alike, called)))


def run_in_turns(built, config, num_steps):
    """Losses and CPU seconds of each program's steps, on the same batches."""
    rng = np.random.default_rng(0)
    states = {name: programs.init() for name, (_, _, programs) in built.items()}
    losses, times = ({name: [] for name in built} for _ in range(2))
    for _ in range(num_steps):
        shape = built["compact"][2].abstract_tokens.shape
        batch = rng.integers(0, 256, (2, *shape), np.int32)
        for name, (_, compiled, programs) in built.items():
            batch_here = jax.device_put(tuple(batch), programs.abstract_tokens.sharding)
            start = time.process_time()
            out = jax.block_until_ready(compiled(states[name], *batch_here))
            times[name].append(time.process_time() - start)
            states[name], metrics = out
            losses[name].append(float(metrics["loss"]))
    return losses, times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    config = load_config(args.config)
    jax.config.update("jax_num_cpu_devices", config.num_devices)
    print(
        f"{config.name}: {config.schedule} on {dict(config.mesh)}, "
        f"{config.num_microbatches} microbatches; Python {platform.python_version()}, "
        f"jax {jax.__version__}, {os.cpu_count()} cores",
        flush=True,
    )
    built = {
        name: build(dataclasses.replace(config, overlap=overlap))
        for name, overlap in PROGRAMS.items()
    }
    rows = {
        figure: [built[name][0][figure] for name in PROGRAMS]
        for figure in built["compact"][0]
    }
    losses, times = run_in_turns(built, config, args.steps)
    # The first steps warm up.
    rows["a step, CPU s"] = [statistics.median(times[name][2:]) for name in PROGRAMS]
    print(f"{'':25} {'overlapped':>10} {'compact':>10}  ratio")
    for figure, (before, after) in rows.items():
        form = ",.0f" if before >= 1000 else ".2f"
        print(f"{figure:25} {before:10{form}} {after:10{form}} {after / before:6.2f}")
    ours, theirs = np.array(losses["compact"]), np.array(losses["overlapped"])
    print(
        f"largest relative difference of losses {np.abs(ours / theirs - 1).max():.1e}"
    )


if __name__ == "__main__":
    main()
