"""What a report takes for granted, in words."""

from __future__ import annotations

from collections.abc import Iterable

from dualpipe_jax.gpu.overlap.links import BETWEEN_LATENCY_S, INSIDE_LATENCY_S
from dualpipe_jax.gpu.overlap.program import (
    BLOCKS,
    GIVEN,
    GUARD,
    KNOWN,
    UNKNOWN,
    Program,
)
from dualpipe_jax.gpu.overlap.work import KERNEL_LATENCY_S
from dualpipe_jax.gpu.topology import Gpu


def assumptions(
    program: Program,
    gpu: Gpu,
    gpus_per_node: int,
    efficiency: float,
    kinds: Iterable[str],
    unknown: Iterable[str],
) -> tuple[str, ...]:
    """The sentences of a report.

    Args:
      program: what was read.
      gpu: whose peaks the times are reckoned with.
      gpus_per_node: devices of one node.
      efficiency: part of the peaks that kernels reach.
      kinds: of the collectives.
      unknown: targets of custom calls whose FLOPs are not known.
    """
    said = [
        f"{gpu.name}: {gpu.bf16_flops / 1e12:.0f} TFLOP/s of bfloat16 and "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s, of which kernels reach "
        f"{efficiency:.0%}; NVLink {gpu.nvlink_bandwidth / 1e9:.0f} GB/s, "
        f"network {gpu.network_bandwidth / 1e9:.0f} GB/s",
        f"latencies: {KERNEL_LATENCY_S * 1e6:g} us a kernel, "
        f"{INSIDE_LATENCY_S * 1e6:g} us a collective inside a node, "
        f"{BETWEEN_LATENCY_S * 1e6:g} us between nodes",
        f"device i is in node i // {gpus_per_node}",
    ]
    if "ragged-all-to-all" in kinds:
        said.append("ragged all-to-alls send what fits both buffers, to all alike")
    said.append(
        "a loop's body takes as long in every trip; caches are not known, nor are "
        "links that others use; kernels of causal attention skip the other half"
    )
    guessed: dict[str, dict[str, float]] = {}
    for paths in program.paths.values():
        for frame in (path[-1] for path in paths if path):
            if frame.kind == "while" and frame.source not in (KNOWN, GIVEN):
                guessed.setdefault(frame.source, {})[frame.computation] = frame.trips
    words = {
        GUARD: "zero or one time: reckoned with once",
        BLOCKS: "as often as it takes to go through a buffer in blocks: guessed to be "
        "all of it, once",
        UNKNOWN: "as often as data say: reckoned with once; trip_counts= tells better",
    }
    for source, loops in guessed.items():
        names = ", ".join(list(loops)[:3]) + (", ..." if len(loops) > 3 else "")
        count = f"{len(loops)} loops run" if len(loops) > 1 else "1 loop runs"
        said.append(f"{count} {words[source]} ({names})")
    if unknown:
        names = ", ".join(sorted(unknown))
        said.append(f"custom calls whose FLOPs are not known count none: {names}")
    return tuple(said)
