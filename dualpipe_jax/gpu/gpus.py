"""The GPUs that can be compiled for: their peaks, links and memory."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as XLA's compiler describes it (GpuTargetConfigProto), and its peaks.

    Attributes:
      name: the driver's name of it.
      compute_capability: (major, minor).
      core_count: streaming multiprocessors.
      clock_rate_ghz: boost clock.
      memory_bandwidth: bytes per second.
      memory_size: bytes.
      l2_cache_size: bytes.
      bf16_flops: of dense bfloat16 matrix products, per second; TF32 is half as fast.
      nvlink_bandwidth: usable bytes per second in one direction, inside a node.
      network_bandwidth: the same between nodes, of one GPU's network card.
      has_fp8: whether its tensor cores multiply float8.
      fpus_per_core: float32 units per multiprocessor.
      shared_memory_per_core: bytes per multiprocessor.
      shared_memory_per_block_optin: the most bytes that a block may opt in to.
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

    @property
    def fp8_flops(self) -> float | None:
        """The same of float8; None if the tensor cores have none.

        Examples:
          >>> GPUS["h800"].fp8_flops, GPUS["a100"].fp8_flops
          (1978800000000000.0, None)
        """
        return 2 * self.bf16_flops if self.has_fp8 else None

    def target_config(self) -> str:
        """Returns the text form of stream_executor's GpuTargetConfigProto."""
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

# From NVIDIA's data sheets of the SXM modules, without sparsity; a network card of
# 400 Gb/s per GPU, of 200 Gb/s for the A100.
GPUS: dict[str, Gpu] = {
    "h100": _H100,
    # An H100 with half of the NVLinks: 160 GB/s usable (arXiv:2412.19437, section 3.2).
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


def find_gpu(gpu: str | Gpu) -> Gpu:
    """Returns a GPU by its key in `GPUS`; a `Gpu` is returned as it is.

    Raises:
      ValueError: the key is unknown.

    Examples:
      >>> find_gpu("h800").nvlink_bandwidth
      160000000000.0
    """
    if isinstance(gpu, Gpu):
        return gpu
    if gpu not in GPUS:
        raise ValueError(
            f"{gpu=} is unknown; choose from {', '.join(GPUS)}, or pass a "
            "dualpipe_jax.gpu.Gpu."
        )
    return GPUS[gpu]


def gpu_of_device_kind(kind: str | None) -> Gpu | None:
    """Returns the GPU that a device's `device_kind` names; None if it names none.

    Examples:
      >>> gpu_of_device_kind("NVIDIA H200").name
      'NVIDIA H200 141GB HBM3e'
    """
    for key, gpu in GPUS.items():
        if kind is not None and (kind == gpu.name or key.upper() in kind.upper()):
            return gpu
    return None
