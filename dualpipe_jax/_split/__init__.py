"""How `dualpipe_jax.split_backward` works: jaxprs, cut in two.

In the order of reading: `jaxprs` (what equations cost, what depends on what), `flatten`
(calls inlined), `mincut`, `cut` (one jaxpr into an early and a late program), `loops`
(scans, conds and shard_maps first become two each: `scans`, `branches`, and cheap ones
move into their readers: `fuse`), `programs` (F, I, W and B of a function).
"""
