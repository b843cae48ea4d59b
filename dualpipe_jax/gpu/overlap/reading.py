"""Reads a compiled program, and reports on its overlap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from dualpipe_jax.gpu.gpus import GPUS, Gpu, find_gpu, gpu_of_device_kind
from dualpipe_jax.gpu.overlap import hlo
from dualpipe_jax.gpu.overlap.links import Links
from dualpipe_jax.gpu.overlap.program import HloProgram
from dualpipe_jax.gpu.overlap.report import OverlapReport
from dualpipe_jax.gpu.overlap.work import Roofline


def overlap_report(
    compiled: jax.stages.Compiled | str,
    *,
    gpu: str | Gpu | None = None,
    gpus_per_node: int = 8,
    efficiency: float = 0.7,
    trip_counts: Mapping[str, float] | float | None = None,
) -> OverlapReport:
    r"""Reports how much of a compiled program's communication runs under compute.

    Args:
      compiled: `jax.jit(f).lower(...).compile()` for GPUs, attached or of `gpu_mesh`;
        or the text of a scheduled module.
      gpu: the GPU to estimate times for: a key of `dualpipe_jax.gpu.GPUS`, or a
        `Gpu`; by default the GPU that the program was compiled for.
      gpus_per_node: device i is taken to be in node `i // gpus_per_node`.
      efficiency: fraction of the peak FLOP/s and of the memory bandwidth that kernels
        reach.
      trip_counts: of loops whose trips depend on data: one number for all of them, or
        numbers by the name of the body, or by a pattern.

    Returns:
      The report: print it, or see `loops`, `steady_state`, `to_json`, `chrome_trace`.

    Raises:
      ValueError: the program is not compiled for GPUs, or the text is not a scheduled
        module; or `gpu` is unknown, or not given and not the program's.

    Examples:
      >>> report = overlap_report('''HloModule f, is_scheduled=true, num_partitions=2
      ... ENTRY %main (p: bf16[1024,1024]) -> bf16[1024,1024] {
      ...   %p = bf16[1024,1024] parameter(0)
      ...   %go = (bf16[1024,1024], bf16[1024,1024]) collective-permute-start(%p), \
      ...     source_target_pairs={{0,1},{1,0}}
      ...   %y = bf16[1024,1024] dot(%p, %p), lhs_contracting_dims={1}, \
      ...     rhs_contracting_dims={0}
      ...   ROOT %x = bf16[1024,1024] collective-permute-done(%go)
      ... }''', gpu="h100")
      >>> permute = report.steady_state.collectives[0]
      >>> permute.num_bytes, permute.link, permute.under.flops == 2 * 1024**3
      (2097152.0, 'nvlink', True)
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"{efficiency=} must be above 0 and at most 1.")
    if gpus_per_node < 1:
        raise ValueError(f"{gpus_per_node=} must be at least 1.")
    given = trip_counts.values() if isinstance(trip_counts, Mapping) else [trip_counts]
    if any(trips is not None and trips < 0 for trips in given):
        raise ValueError(f"{trip_counts=} must not be negative.")
    if isinstance(compiled, str):
        text, device = compiled, None
    elif isinstance(compiled, jax.stages.Compiled):
        text, device = compiled.as_text(), _device_of(compiled)
        if text is None:
            raise ValueError("the compiled program has no text; pass its HLO as a str.")
        if device is not None and device.platform not in ("gpu", "cuda"):
            raise ValueError(
                f"the program was compiled for {device.platform!r}, where nothing "
                "overlaps; compile it for GPUs, attached or of dualpipe_jax.gpu_mesh."
            )
    else:
        raise ValueError(
            f"compiled={type(compiled).__name__} is neither a jax.stages.Compiled nor "
            "text; call lower(...).compile() first."
        )
    chosen = _gpu_of(device) if gpu is None else find_gpu(gpu)
    module = hlo.parse(text)
    links = Links(module, chosen, gpus_per_node)
    roofline = Roofline(module, chosen, efficiency)
    program = HloProgram(module, links, roofline, trip_counts)
    return OverlapReport(program, chosen, gpus_per_node, efficiency, roofline.unknown)


def _device_of(compiled: jax.stages.Compiled) -> Any:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    for sharding in shardings:
        for device in getattr(sharding, "device_set", ()):
            return device
    return None


def _gpu_of(device: Any) -> Gpu:
    kind = None if device is None else device.device_kind
    found = gpu_of_device_kind(kind)
    if found is None:
        raise ValueError(
            f"gpu=None: the device kind {kind!r} is not a known GPU; pass gpu= one of "
            f"{', '.join(GPUS)}, or a dualpipe_jax.gpu.Gpu with its peaks."
        )
    return found
