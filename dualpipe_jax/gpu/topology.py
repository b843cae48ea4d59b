"""Meshes of compile-only GPUs, for XLA's real GPU compiler without a GPU.

What is compiled for such a mesh is what the GPUs would run: `compiled.as_text()` is
the scheduled module, `compiled.memory_analysis()` the bytes that a GPU needs. Nothing
can be executed on it. It needs the extra `gpu-aot` (jax's CUDA plugin), but no CUDA
libraries, no driver and no GPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from dualpipe_jax import compat
from dualpipe_jax.gpu.gpus import Gpu, find_gpu


def gpu_mesh(
    gpu: str | Gpu, axes: Mapping[str, int], *, gpus_per_host: int = 8
) -> Mesh:
    """Makes a mesh of compile-only GPUs.

    Args:
      gpu: a key of `dualpipe_jax.gpu.GPUS`, or a `Gpu`.
      axes: name and size of each mesh axis, the slowest first.
      gpus_per_host: GPUs per node; a mesh of fewer GPUs is one smaller node.

    Returns:
      A mesh for `jax.jit(f).lower(...).compile(compiler_options=...)`, where the
      arguments are `jax.ShapeDtypeStruct`s with shardings over it, and the options are
      `gpu_compiler_options()`.

    Raises:
      ValueError: the GPU is unknown, an axis is empty, a node would be filled only in
        part, or the plugin is not installed.

    Examples:
      >>> mesh = gpu_mesh("h100", {"pp": 16, "ep": 64})
      >>> mesh.size, mesh.devices[0, 0].device_kind
      (1024, 'NVIDIA H100 80GB HBM3')
    """
    described = find_gpu(gpu)
    if not axes or min(axes.values()) < 1:
        raise ValueError(f"{axes=} must name at least one axis, of size 1 or more.")
    count = math.prod(axes.values())
    host_size = min(gpus_per_host, count)
    if count % host_size:
        raise ValueError(
            f"{axes=} has {count} GPUs, which is not a multiple of {gpus_per_host=}; "
            "change one of them."
        )
    devices = _devices(described, f"1x{count // host_size}x{host_size}")
    return Mesh(
        np.array(devices).reshape(tuple(axes.values())),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
    )


def _devices(gpu: Gpu, topology: str) -> list[Any]:
    # When it loads, the plugin checks for CUDA libraries, which are not needed here.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.target_config(), topology=topology
        )
    except Exception as error:
        raise ValueError(
            f"jax {jax.__version__} cannot describe a GPU topology without its CUDA "
            f"plugin of the same version (installed: {_installed_plugins()}); pip "
            "install 'dualpipe-jax[gpu-aot]', which chooses the version that fits. "
            f"({type(error).__name__}: {error})"
        ) from error
    return description.devices


def _installed_plugins() -> str:
    """Names jax's CUDA plugins and their versions."""
    found = []
    for cuda in (12, 13):
        name = f"jax-cuda{cuda}-pjrt"
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return " and ".join(found) or "none"


@contextlib.contextmanager
def shared_kernels() -> Iterator[dict[str, str]]:
    """Yields options with which compilations share the machine code of their kernels.

    If programs have kernels in common, or one program is compiled twice, the code of
    each kernel is generated once; the programs are the same as without the options. XLA
    keeps the code in a file that is removed at the end. Compile one program at a time:
    the file is not locked. jax's compilation cache is not used in the block: it would
    keep programs for compile-only devices, but could not load them.
    """
    no_cache = compat.cache_settings({"jax_enable_compilation_cache": False})
    with no_cache, tempfile.TemporaryDirectory() as folder:
        yield {"xla_gpu_kernel_cache_file": str(Path(folder, "kernels"))}


def gpu_compiler_options(*, compile_only: bool = True) -> dict[str, bool | int]:
    """Returns options for `lowered.compile(compiler_options=...)` for GPUs.

    Args:
      compile_only: True for the devices of `gpu_mesh`, False for attached GPUs.

    Returns:
      Values by name.

      - xla_gpu_enable_latency_hiding_scheduler: orders instructions so that
        collectives run under compute.
      - xla_gpu_experimental_parallel_collective_overlap_limit 4: small collectives
        (token counts, router weights) run beside a large one; with XLA's default of
        one at a time, the large one waits for them.
      - xla_gpu_memory_limit_slop_factor 118: XLA's scheduler overlaps nothing in a
        module that takes more than 80 % x 95 % of the memory. This raises the limit to
        94 %, for a job with a GPU to itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
      - xla_gpu_autotune_level 0 with `compile_only`: there is no GPU to time kernels
        on.

    Examples:
      >>> gpu_compiler_options()["xla_gpu_enable_latency_hiding_scheduler"]
      True
    """
    options: dict[str, bool | int] = {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
        "xla_gpu_memory_limit_slop_factor": 118,
    }
    if compile_only:
        options["xla_gpu_autotune_level"] = 0
    return options
