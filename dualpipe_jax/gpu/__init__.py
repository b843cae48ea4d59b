"""GPU meshes without GPUs, and what a compiled step needs of a GPU's memory.

Imports: executor, pictures.
"""

from dualpipe_jax.gpu.memory import MemoryReport, memory_report
from dualpipe_jax.gpu.topology import GPUS as GPUS, Gpu, gpu_compiler_options, gpu_mesh

__all__ = [
    "Gpu",
    "MemoryReport",
    "gpu_compiler_options",
    "gpu_mesh",
    "memory_report",
]
