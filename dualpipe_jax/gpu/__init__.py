"""GPU meshes without GPUs, and what a compiled step needs of a GPU's memory.

Imports: executor, pictures.
"""

from dualpipe_jax.gpu.gpus import (
    GPUS,
    Gpu,
    find_gpu as find_gpu,
    gpu_of_device_kind as gpu_of_device_kind,
)
from dualpipe_jax.gpu.memory import MemoryReport, memory_report
from dualpipe_jax.gpu.topology import (
    gpu_compiler_options,
    gpu_mesh,
    shared_kernels as shared_kernels,
)

__all__ = [
    "GPUS",
    "Gpu",
    "MemoryReport",
    "gpu_compiler_options",
    "gpu_mesh",
    "memory_report",
]
