"""DualPipe for JAX: pipeline schedules as data, run as one jitted SPMD program.

Schedules, their simulator and their lowering need no jax, so importing this
package does not import it; the names that do need it are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING

from dualpipe_jax.choose import (
    MemoryUse,
    RankedSchedule,
    Ranking,
    Remat,
    StageMemory,
    rank_schedules,
)
from dualpipe_jax.generators.dualpipe import dualpipe
from dualpipe_jax.generators.dualpipev import dualpipev
from dualpipe_jax.generators.gpipe import gpipe
from dualpipe_jax.generators.one_f_one_b import one_f_one_b
from dualpipe_jax.generators.zb1p import zb1p
from dualpipe_jax.lowering import Program, lower
from dualpipe_jax.partition import Partition, partition_layers
from dualpipe_jax.schedule import Schedule
from dualpipe_jax.simulator import Costs, Timeline, simulate
from dualpipe_jax.tasks import Task
from dualpipe_jax.trace import TraceReport, read_trace

if TYPE_CHECKING:
    from dualpipe_jax.interleaved import run_interleaved
    from dualpipe_jax.memory import MemoryReport, memory_report
    from dualpipe_jax.overlap import (
        OverlapReport,
        compile_overlapped,
        overlap_report,
    )
    from dualpipe_jax.pipeline import (
        PipelineParams,
        pipeline_forward,
        pipeline_value_and_grad,
        stack_stages,
    )
    from dualpipe_jax.profiling import profile
    from dualpipe_jax.split_backward import split_vjp
    from dualpipe_jax.topology import gpu_compiler_options, gpu_mesh

__version__ = "0.1.0"

__all__ = [
    "Costs",
    "MemoryReport",
    "MemoryUse",
    "OverlapReport",
    "Partition",
    "PipelineParams",
    "Program",
    "RankedSchedule",
    "Ranking",
    "Remat",
    "Schedule",
    "StageMemory",
    "Task",
    "Timeline",
    "TraceReport",
    "compile_overlapped",
    "dualpipe",
    "dualpipev",
    "gpipe",
    "gpu_compiler_options",
    "gpu_mesh",
    "lower",
    "memory_report",
    "one_f_one_b",
    "overlap_report",
    "partition_layers",
    "pipeline_forward",
    "pipeline_value_and_grad",
    "profile",
    "rank_schedules",
    "read_trace",
    "run_interleaved",
    "simulate",
    "split_vjp",
    "stack_stages",
    "zb1p",
]

# Exported names that need jax, and the modules that define them (PEP 562).
_NEEDS_JAX = {
    "MemoryReport": "dualpipe_jax.memory",
    "OverlapReport": "dualpipe_jax.overlap",
    "PipelineParams": "dualpipe_jax.pipeline",
    "compile_overlapped": "dualpipe_jax.overlap",
    "gpu_compiler_options": "dualpipe_jax.topology",
    "gpu_mesh": "dualpipe_jax.topology",
    "memory_report": "dualpipe_jax.memory",
    "overlap_report": "dualpipe_jax.overlap",
    "pipeline_forward": "dualpipe_jax.pipeline",
    "pipeline_value_and_grad": "dualpipe_jax.pipeline",
    "profile": "dualpipe_jax.profiling",
    "run_interleaved": "dualpipe_jax.interleaved",
    "split_vjp": "dualpipe_jax.split_backward",
    "stack_stages": "dualpipe_jax.pipeline",
}


def __getattr__(name: str):
    if name not in _NEEDS_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_NEEDS_JAX[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
