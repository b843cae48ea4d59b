"""Compiles a step twice: the second time XLA's scheduler knows what everything costs.

XLA orders instructions before it knows how long they take: its default estimate ends
an exchange of 470 MB over the network after a few products. Its scheduler reads
measured costs from a profile (profile-guided latency estimation); these costs are the
estimates of `overlap_report`, so nothing has to run first.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dualpipe_jax.gpu.gpus import Gpu
from dualpipe_jax.gpu.overlap.reading import overlap_report
from dualpipe_jax.gpu.overlap.report import OverlapReport
from dualpipe_jax.gpu.topology import gpu_compiler_options, shared_kernels

_PROFILE = "xla_gpu_pgle_profile_file_or_directory_path"


def compile_overlapped(
    lowered: Any,
    *,
    gpu: str | Gpu | None = None,
    gpus_per_node: int = 8,
    efficiency: float = 0.7,
    compiler_options: Mapping[str, Any] | None = None,
) -> Any:
    """Compiles for GPUs so that communication runs under compute.

    Args:
      lowered: of `jax.jit(...).lower(...)`, for attached GPUs or for those of
        `gpu_mesh`.
      gpu: see `overlap_report`, also for the next two.
      gpus_per_node: GPUs per node.
      efficiency: fraction of the GPU's peaks that kernels reach.
      compiler_options: options that override `gpu_compiler_options()`.

    Returns:
      A `jax.stages.Compiled`.

    Raises:
      ValueError: `gpu` is unknown, or the program is not for GPUs.

    Examples:
      >>> import jax
      >>> from dualpipe_jax import gpu_mesh
      >>> mesh = gpu_mesh("h100", {"ep": 2})
      >>> halves = jax.NamedSharding(mesh, jax.P("ep"))
      >>> x = jax.ShapeDtypeStruct((4, 8), "float32", sharding=halves)
      >>> compiled = compile_overlapped(jax.jit(lambda x: x.sum(axis=0)).lower(x))
      >>> "all-reduce" in compiled.as_text()
      True
    """
    with _kernels() as kernels:
        options = {**options_here(), **kernels, **(compiler_options or {})}
        first = lowered.compile(options)
        report = overlap_report(
            first, gpu=gpu, gpus_per_node=gpus_per_node, efficiency=efficiency
        )
        if not report.collectives:
            return first
        profile = _written(scheduling_profile(report))
        return lowered.compile({**options, _PROFILE: profile})


def compile_for(lowered: Any, mesh: Mesh) -> Any:
    """Compiles for a mesh's devices: with `compile_overlapped` for GPUs.

    For a GPU of unknown peaks it warns, and leaves XLA its own costs. CPUs overlap
    nothing, so a step for them is compiled once.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return lowered.compile()
    try:
        return compile_overlapped(lowered)
    except ValueError as error:
        warnings.warn(f"compiled with XLA's own costs: {error}", stacklevel=2)
        return lowered.compile(options_here())


def _written(profile: str) -> str:
    """Writes a file with this text, named by its hash, and returns its path.

    jax's compilation cache hashes options, and so the name; several processes may share
    a host. The file is left for them.
    """
    digest = hashlib.sha256(profile.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"dualpipe_jax_{digest}.pbtxt"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(profile)
    return str(Path(file.name).replace(path))


def _has_gpus() -> bool:
    return jax.default_backend() == "gpu"


def options_here() -> dict[str, bool | int]:
    """Returns `gpu_compiler_options` for this process, with or without GPUs."""
    return gpu_compiler_options(compile_only=not _has_gpus())


def _kernels() -> AbstractContextManager[dict[str, Any]]:
    return contextlib.nullcontext({}) if _has_gpus() else shared_kernels()


def scheduling_profile(report: OverlapReport) -> str:
    """Returns the costs as text of a ProfiledInstructionsProto, in microseconds."""
    return "".join(
        f'costs {{ name: "{name}" cost_us: {1e6 * seconds:.3f} }}\n'
        for name, seconds in report.costs().items()
    )
