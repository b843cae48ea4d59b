"""What a report takes for granted, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dualpipe_jax.gpu.gpus import Gpu
from dualpipe_jax.gpu.overlap.links import BETWEEN_LATENCY_S, INSIDE_LATENCY_S
from dualpipe_jax.gpu.overlap.program import (
    BLOCKS,
    GIVEN,
    GUARD,
    KNOWN,
    RARE,
    UNKNOWN,
    HloProgram,
)
from dualpipe_jax.gpu.overlap.work import KERNEL_LATENCY_S

_GUESSES = {
    GUARD: "at most once: counted as once",
    RARE: "in exceptional cases only: counted as none",
    BLOCKS: "over the blocks of a buffer: guessed to cover it once",
    UNKNOWN: "a data-dependent number of times: counted as once, unless trip_counts= "
    "says otherwise",
}


def assumptions(
    program: HloProgram,
    gpu: Gpu,
    gpus_per_node: int,
    efficiency: float,
    kinds: Iterable[str],
    unknown: Iterable[str],
) -> tuple[str, ...]:
    """Returns a report's assumptions, one sentence each.

    Args:
      program: the program that was read.
      gpu: the GPU that times are estimated for.
      gpus_per_node: devices per node.
      efficiency: fraction of the peaks that kernels reach.
      kinds: of the collectives.
      unknown: targets of custom calls whose FLOPs are unknown.
    """
    found = [
        f"{gpu.name}: {_products(gpu)} and "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s, of which kernels reach "
        f"{efficiency:.0%}; NVLink {gpu.nvlink_bandwidth / 1e9:.0f} GB/s, "
        f"network {gpu.network_bandwidth / 1e9:.0f} GB/s",
        f"latencies: {KERNEL_LATENCY_S * 1e6:g} us per kernel, "
        f"{INSIDE_LATENCY_S * 1e6:g} us per collective inside a node, "
        f"{BETWEEN_LATENCY_S * 1e6:g} us between nodes",
        f"device i is in node i // {gpus_per_node}",
    ]
    if "ragged-all-to-all" in kinds:
        found.append(
            "ragged all-to-alls send as much as fits both buffers, to all devices alike"
        )
    found.append(
        "a loop's body takes equally long in every trip; caches and other users of the "
        "links are not modeled; causal attention kernels skip the masked half"
    )
    found += _guessed_trips(program)
    if unknown:
        names = ", ".join(sorted(unknown))
        found.append(f"custom calls of unknown FLOPs count as zero FLOPs: {names}")
    return tuple(found)


def _products(gpu: Gpu) -> str:
    rates = f"{gpu.bf16_flops / 1e12:.0f} TFLOP/s of bfloat16"
    return rates + (f", {gpu.fp8_flops / 1e12:.0f} of float8" if gpu.fp8_flops else "")


def _guessed_trips(program: HloProgram) -> Iterator[str]:
    loops_by_source: dict[str, dict[str, None]] = {}
    for paths in program.paths.values():
        for frame in (path[-1] for path in paths if path):
            if frame.kind == "while" and frame.source not in (KNOWN, GIVEN):
                loops_by_source.setdefault(frame.source, {})[frame.computation] = None
    for source, loops in loops_by_source.items():
        names = ", ".join(list(loops)[:3]) + (", ..." if len(loops) > 3 else "")
        count = f"{len(loops)} loops run" if len(loops) > 1 else "1 loop runs"
        yield f"{count} {_GUESSES[source]} ({names})"
