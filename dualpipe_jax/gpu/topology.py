"""GPU meshes without GPUs: compile-only devices for XLA's real GPU pipeline.

What such a mesh compiles is what the GPUs would run: `compiled.as_text()` is the
scheduled module, `compiled.memory_analysis()` the bytes a GPU needs. Nothing can
be executed on it. It needs the extra `gpu-aot` (jax's CUDA plugin), but no CUDA
libraries, no driver and no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA wants to know of a GPU (its GpuTargetConfigProto), and what it can do.

    Attributes:
      name: what the driver calls it.
      compute_capability: (major, minor).
      core_count: streaming multiprocessors.
      clock_rate_ghz: boost clock.
      memory_bandwidth: bytes per second.
      memory_size: bytes.
      l2_cache_size: bytes.
      bf16_flops: of dense bfloat16 matrix products, per second; float8 is twice as
        fast where the GPU has it, TF32 half.
      nvlink_bandwidth: usable bytes per second of one direction, inside a node.
      network_bandwidth: the same between nodes, of one GPU's network card.
      has_fp8: whether its tensor cores multiply float8.
      fpus_per_core: float32 units of one multiprocessor.
      shared_memory_per_core: bytes of one multiprocessor.
      shared_memory_per_block_optin: bytes that one block may ask for.
    """

    name: str
    compute_capability: tuple[int, int]
    core_count: int
    clock_rate_ghz: float
    memory_bandwidth: int
    memory_size: int
    l2_cache_size: int
    bf16_flops: float
    nvlink_bandwidth: float
    network_bandwidth: float
    has_fp8: bool = True
    fpus_per_core: int = 128
    shared_memory_per_core: int = 233472
    shared_memory_per_block_optin: int = 232448

    def target_config(self) -> str:
        """The GPU as the text form of stream_executor's GpuTargetConfigProto."""
        major, minor = self.compute_capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block_optin: {self.shared_memory_per_block_optin}
  threads_per_core_limit: 2048
  core_count: {self.core_count}
  fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_cache_size}
  clock_rate_ghz: {self.clock_rate_ghz}
  device_memory_size: {self.memory_size}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{self.name}"
"""


_H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    core_count=132,
    clock_rate_ghz=1.98,
    memory_bandwidth=3_352_320_000_000,
    memory_size=84_929_347_584,
    l2_cache_size=52_428_800,
    bf16_flops=989.4e12,
    nvlink_bandwidth=450e9,
    network_bandwidth=50e9,
)

# NVIDIA's data sheets of the SXM modules, without sparsity; 400 Gb/s of network a GPU,
# 200 Gb/s for the A100.
GPUS: dict[str, Gpu] = {
    "h100": _H100,
    # An H100 with half of the NVLinks; 160 GB/s usable (arXiv:2412.19437, section 3.2).
    "h800": dataclasses.replace(
        _H100, name="NVIDIA H800 80GB HBM3", nvlink_bandwidth=160e9
    ),
    "h200": dataclasses.replace(
        _H100,
        name="NVIDIA H200 141GB HBM3e",
        memory_bandwidth=4_800_000_000_000,
        memory_size=150_110_011_392,
    ),
    "a100": Gpu(
        name="NVIDIA A100 80GB",
        compute_capability=(8, 0),
        core_count=108,
        clock_rate_ghz=1.41,
        memory_bandwidth=2_039_000_000_000,
        memory_size=84_987_740_160,
        l2_cache_size=41_943_040,
        bf16_flops=312e12,
        nvlink_bandwidth=300e9,
        network_bandwidth=25e9,
        has_fp8=False,
        fpus_per_core=64,
        shared_memory_per_core=167_936,
        shared_memory_per_block_optin=166_912,
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        compute_capability=(10, 0),
        core_count=148,
        clock_rate_ghz=1.965,
        memory_bandwidth=8_000_000_000_000,
        memory_size=191_503_925_248,
        l2_cache_size=132_120_576,
        bf16_flops=2250e12,
        nvlink_bandwidth=900e9,
        network_bandwidth=50e9,
    ),
}


def gpu_mesh(gpu: str, axes: Mapping[str, int], *, gpus_per_host: int = 8) -> Mesh:
    """A mesh of compile-only GPUs.

    Args:
      gpu: a key of `GPUS`.
      axes: name and size of each mesh axis, the slowest first.
      gpus_per_host: GPUs of one node; fewer make a smaller node.

    Returns:
      A mesh for `jax.jit(f).lower(...).compile(compiler_options=...)`, where the
      arguments are `jax.ShapeDtypeStruct`s with shardings over it, and the options are
      `gpu_compiler_options()`.

    Raises:
      ValueError: the GPU is not known, an axis is empty, nodes would be filled in
        part, or the plugin is not installed.

    Examples:
      >>> mesh = gpu_mesh("h100", {"pp": 16, "ep": 64})
      >>> mesh.size, mesh.devices[0, 0].device_kind
      (1024, 'NVIDIA H100 80GB HBM3')
    """
    if gpu not in GPUS:
        raise ValueError(f"{gpu=} is not known; choose one of {sorted(GPUS)}.")
    if not axes or min(axes.values()) < 1:
        raise ValueError(f"{axes=} must name at least one axis, of size 1 or more.")
    count = math.prod(axes.values())
    a_host = min(gpus_per_host, count)
    if count % a_host:
        raise ValueError(
            f"{axes=} has {count} GPUs, which is no multiple of {gpus_per_host=}; "
            "change one of them."
        )
    devices = _devices(GPUS[gpu], f"1x{count // a_host}x{a_host}")
    return Mesh(
        np.array(devices).reshape(tuple(axes.values())),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
    )


def _devices(gpu: Gpu, topology: str) -> list[Any]:
    # The plugin looks for CUDA libraries when it loads, and here it needs none.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.target_config(), topology=topology
        )
    except Exception as error:
        raise ValueError(
            f"jax {jax.__version__} cannot describe a GPU topology without its CUDA "
            f"plugin of the same version, and there is {_installed_plugins()}; pip "
            "install 'dualpipe-jax[gpu-aot]', which takes the one that fits. "
            f"({type(error).__name__}: {error})"
        ) from error
    return description.devices


def _installed_plugins() -> str:
    """Jax's CUDA plugins and their versions, in words."""
    found = []
    for cuda in (12, 13):
        name = f"jax-cuda{cuda}-pjrt"
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return " and ".join(found) or "none"


def gpu_compiler_options(*, compile_only: bool = True) -> dict[str, bool | int]:
    """Options for `lowered.compile(compiler_options=...)` for GPUs.

    Args:
      compile_only: for the devices of `gpu_mesh`; False: for GPUs that are there.

    Returns:
      Values by name.

      - xla_gpu_enable_latency_hiding_scheduler: orders instructions so that
        collectives run under compute.
      - xla_gpu_experimental_parallel_collective_overlap_limit 4: small collectives
        (counts of tokens, weights of choices) fly beside a large one; with XLA's
        default of one at a time, the large one waits for them.
      - xla_gpu_memory_limit_slop_factor 118: XLA's scheduler overlaps nothing in a
        module that takes more than 80 % x 95 % of the memory. This makes it 94 %, for
        a job that has the GPU for itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
      - xla_gpu_autotune_level 0 with `compile_only`: no GPU is there to time kernels.

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
