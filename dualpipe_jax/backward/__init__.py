"""The backward of any function, cut into input half (I) and weight half (W).

In the order of reading: `jaxprs` (what equations cost, what depends on what), `flatten`
(calls inlined), `mincut`, `cut` (one jaxpr into an early and a late program), `loops`
(scans, conds and shard_maps first become two each: `scans`, `branches`, and cheap ones
move into their readers: `fuse`), `programs` (F, I, W and B of a function). `split_vjp`,
`SplitBackward` and `run_interleaved` are what others use.

Imports: nothing.
"""

from dualpipe_jax.backward.flop_count import flops
from dualpipe_jax.backward.interleaved import run_interleaved
from dualpipe_jax.backward.split_backward import SplitBackward, split_vjp

__all__ = [
    "SplitBackward",
    "flops",
    "run_interleaved",
    "split_vjp",
]
