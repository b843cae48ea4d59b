"""Reads what XLA compiled for GPUs and reports how much communication is hidden.

`hlo` reads the text, with `instructions` and `shapes`; `flops` and `work` estimate
kernels, `collectives`, `links` and `groups` collectives. `program` finds out how often
each computation runs, with `guesses` where XLA does not say, and `timeline` simulates
one run of it. `reading` makes a `report` of that, from `records`, `phases` and
`assumptions`; `render`, `spans` and `chrome` show it. `compiling` passes its costs to
XLA's scheduler.

Imports: gpu, pictures.
"""

from dualpipe_jax.gpu.overlap import hlo as hlo
from dualpipe_jax.gpu.overlap.compiling import (
    compile_for as compile_for,
    compile_overlapped,
    options_here as options_here,
)
from dualpipe_jax.gpu.overlap.links import (
    BETWEEN_LATENCY_S as BETWEEN_LATENCY_S,
    INSIDE_LATENCY_S as INSIDE_LATENCY_S,
    KINDS as KINDS,
)
from dualpipe_jax.gpu.overlap.reading import overlap_report
from dualpipe_jax.gpu.overlap.records import CollectiveReport, LoopReport
from dualpipe_jax.gpu.overlap.report import OverlapReport
from dualpipe_jax.gpu.overlap.work import KERNEL_LATENCY_S as KERNEL_LATENCY_S

__all__ = [
    "CollectiveReport",
    "LoopReport",
    "OverlapReport",
    "compile_overlapped",
    "overlap_report",
]
