"""DualPipe for JAX: pipeline schedules as data, run as one jitted SPMD program.

Schedules, their simulator and their lowering do not need jax, so importing this package
does not import jax; names that need it are loaded on first use.
"""

from typing import TYPE_CHECKING

from dualpipe_jax.lowering import Program, lower
from dualpipe_jax.planning import (
    MemoryUse,
    Partition,
    RankedSchedule,
    Ranking,
    Remat,
    StageMemory,
    partition_layers,
    rank_schedules,
)
from dualpipe_jax.profiles import TraceReport, read_trace
from dualpipe_jax.schedules import Costs, Schedule, Task, Timeline, simulate
from dualpipe_jax.schedules.generators.dualpipe import dualpipe
from dualpipe_jax.schedules.generators.dualpipev import dualpipev
from dualpipe_jax.schedules.generators.gpipe import gpipe
from dualpipe_jax.schedules.generators.interleaved_1f1b import interleaved_1f1b
from dualpipe_jax.schedules.generators.interleaved_zero_bubble import (
    interleaved_zero_bubble,
)
from dualpipe_jax.schedules.generators.looped_bfs import looped_bfs
from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
from dualpipe_jax.schedules.generators.v_half import v_half
from dualpipe_jax.schedules.generators.v_min import v_min
from dualpipe_jax.schedules.generators.zb1p import zb1p
from dualpipe_jax.schedules.generators.zbv import zbv
from eplb_jax import lookup

if TYPE_CHECKING:
    from dualpipe_jax.backward import run_interleaved, split_vjp
    from dualpipe_jax.executor import (
        PipelineParams,
        Weighted,
        pipeline_forward,
        pipeline_value_and_grad,
        stack_stages,
    )
    from dualpipe_jax.gpu import (
        MemoryReport,
        gpu_compiler_options,
        gpu_mesh,
        memory_report,
    )
    from dualpipe_jax.gpu.overlap import (
        OverlapReport,
        compile_overlapped,
        overlap_report,
    )
    from dualpipe_jax.profiles import profile

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
    "Weighted",
    "compile_overlapped",
    "dualpipe",
    "dualpipev",
    "gpipe",
    "gpu_compiler_options",
    "gpu_mesh",
    "interleaved_1f1b",
    "interleaved_zero_bubble",
    "looped_bfs",
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
    "v_half",
    "v_min",
    "zb1p",
    "zbv",
]

# Exported names that need jax, and the rooms that define them.
__getattr__, __dir__ = lookup.attach(
    __name__,
    {
        "MemoryReport": "dualpipe_jax.gpu",
        "OverlapReport": "dualpipe_jax.gpu.overlap",
        "PipelineParams": "dualpipe_jax.executor",
        "Weighted": "dualpipe_jax.executor",
        "compile_overlapped": "dualpipe_jax.gpu.overlap",
        "gpu_compiler_options": "dualpipe_jax.gpu",
        "gpu_mesh": "dualpipe_jax.gpu",
        "memory_report": "dualpipe_jax.gpu",
        "overlap_report": "dualpipe_jax.gpu.overlap",
        "pipeline_forward": "dualpipe_jax.executor",
        "pipeline_value_and_grad": "dualpipe_jax.executor",
        "profile": "dualpipe_jax.profiles",
        "run_interleaved": "dualpipe_jax.backward",
        "split_vjp": "dualpipe_jax.backward",
        "stack_stages": "dualpipe_jax.executor",
    },
)
