"""Reads what XLA compiled for GPUs, and says what of its communication is hidden.

`hlo` reads the text, with `instructions` and `shapes`; `flops` and `work` say what
kernels cost, `collectives` and `links` what collectives cost; `program` knows which
computation runs how often, and `guesses` where XLA does not; `timeline` runs one on
paper. `report` is what a user sees, made of `records`, `phases` and `assumptions`;
`render` and `chrome` show it, and `compiling` gives its costs to XLA.
"""

from dualpipe_jax.overlap.compiling import compile_overlapped
from dualpipe_jax.overlap.records import CollectiveReport, LoopReport
from dualpipe_jax.overlap.report import OverlapReport, overlap_report

__all__ = [
    "CollectiveReport",
    "LoopReport",
    "OverlapReport",
    "compile_overlapped",
    "overlap_report",
]
