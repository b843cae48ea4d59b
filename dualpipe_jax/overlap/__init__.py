"""Reads what XLA compiled for GPUs, and says what of its communication is hidden.

`hlo` reads the text; `flops` and `work` say what kernels cost, `links` what collectives
cost; `program` knows which computation runs how often, `timeline` runs one on paper;
`report` is what a user sees, `render` and `chrome` how.
"""

from dualpipe_jax.overlap.report import (
    CollectiveReport,
    LoopReport,
    OverlapReport,
    overlap_report,
)

__all__ = ["CollectiveReport", "LoopReport", "OverlapReport", "overlap_report"]
