"""The backward pass of any function, cut into an input half (I) and a weight half (W).

In reading order: `jaxprs` (equation costs and dependencies), `flatten` (inlines calls),
`mincut`, `cut` (one jaxpr into an early and a late program), `loops` (first splits each
scan, cond and shard_map in two: `scans`, `branches`; moves cheap ones into the loops
that read them: `fuse`), `programs` (F, I, W and B of a function). The public entry
points are `split_vjp`, `SplitBackward` and `run_interleaved`.

Imports: nothing.
"""

from dualpipe_jax.backward.flop_count import flops
from dualpipe_jax.backward.interleaved import run_interleaved
from dualpipe_jax.backward.jaxprs import jaxprs_in as jaxprs_in
from dualpipe_jax.backward.split_backward import SplitBackward, split_vjp

__all__ = [
    "SplitBackward",
    "flops",
    "run_interleaved",
    "split_vjp",
]
