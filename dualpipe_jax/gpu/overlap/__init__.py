"""Reads what XLA compiled for GPUs and reports how much communication is hidden.

`hlo` reads the text, with `instructions` and `shapes`; `flops` and `work` say what
kernels cost, `collectives` and `links` what collectives cost; `program` knows which
computation runs how often, and `guesses` where XLA does not; `timeline` runs one on
paper. `report` is what a user sees, made of `records`, `phases` and `assumptions`;
`render` and `chrome` show it, and `compiling` gives its costs to XLA.

Imports: gpu, pictures.
"""

from dualpipe_jax.gpu.overlap import hlo as hlo
from dualpipe_jax.gpu.overlap.compiling import (
    compile_for as compile_for,
    compile_overlapped,
    options_here as options_here,
)
from dualpipe_jax.gpu.overlap.records import CollectiveReport, LoopReport
from dualpipe_jax.gpu.overlap.report import OverlapReport, overlap_report

__all__ = [
    "CollectiveReport",
    "LoopReport",
    "OverlapReport",
    "compile_overlapped",
    "overlap_report",
]
