"""Runs two forward passes, each computing while the other communicates.

A server does this with the two microbatches of a batch (DeepSeek-V3 report,
arXiv:2412.19437, section 3.4): attention and experts of one run during the dispatch and
combine of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from dualpipe_jax import compat
from dualpipe_jax.backward.flatten import flatten
from dualpipe_jax.backward.interleave import interleave_forwards
from dualpipe_jax.backward.jaxprs import trace

PyTree = Any


def run_interleaved(
    first: Callable[..., tuple[PyTree, PyTree]],
    second: Callable[..., PyTree],
    params: PyTree,
    first_inputs: Sequence[PyTree],
    second_inputs: Sequence[PyTree],
    *,
    platform: str | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs two forward passes, cut at their exchanges, whose pieces take turns.

    For use inside `jax.shard_map(..., check_vma=False)`. Passes are cut at `all_to_all`
    and `ragged_all_to_all` outside loops and branches. The first pass is half a layer
    ahead, so that each exchange runs under a piece of the other pass. An
    `optimization_barrier` fixes the order; XLA does the overlapping.

    Args:
      first: function of `(params, *inputs)` that returns `(outputs, handed)`.
      second: function of `(params, *inputs, handed)`. It may use in a layer what the
        first computes in that layer; if it would wait longer, it runs after the first.
      params: pytree of the weights, which both read.
      first_inputs: pytrees of arrays.
      second_inputs: pytrees of arrays.
      platform: where it will run; see `SplitBackward.trace`.

    Returns:
      The outputs of `first`, and what `second` returns; the values are those of running
      one after the other.

    Raises:
      ValueError: if a function returns something other than arrays.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,))
      >>> def layer(w, x):
      ...     there = jax.lax.all_to_all(x @ w, "ep", 0, 0, tiled=True)
      ...     return jax.lax.all_to_all(there @ w, "ep", 0, 0, tiled=True)
      >>> def step(w, x, y):
      ...     return run_interleaved(
      ...         lambda w, x: (layer(w, x), ()), lambda w, y, _: layer(w, y),
      ...         w, [x], [y])
      >>> run = jax.jit(jax.shard_map(
      ...     step, mesh=mesh, in_specs=(P(), P("ep"), P("ep")), out_specs=P("ep"),
      ...     check_vma=False))
      >>> x, y = run(2 * jnp.eye(2), jnp.ones((4, 2)), jnp.ones((4, 2)))
      >>> x.tolist() == y.tolist() == [[4.0, 4.0]] * 4
      True
    """
    one, one_consts, trees = _flat(first, (params, *first_inputs), platform)
    outputs, handed = trees.children()
    given = [v.aval for v in one.outvars[outputs.num_leaves :]]
    structs = jax.tree.unflatten(handed, map(compat.struct, given))
    args = (params, *second_inputs, structs)
    two, two_consts, tree = _flat(second, args, platform)
    num_params = len(jax.tree.leaves(params))
    num_weights = (len(one_consts) + num_params, len(two_consts) + num_params)
    pair = interleave_forwards(one, two, num_weights, handed.num_leaves)
    one_args = [*one_consts, *jax.tree.leaves((params, *first_inputs))]
    two_args = [*two_consts, *jax.tree.leaves((params, *second_inputs))]
    if pair is None:
        outs = compat.evaluate(one, *one_args)
        num = outputs.num_leaves
        outs = [*outs[:num], *compat.evaluate(two, *two_args, *outs[num:])]
    else:
        outs = compat.evaluate(pair, *one_args, *two_args)
    num = outputs.num_leaves
    return jax.tree.unflatten(outputs, outs[:num]), jax.tree.unflatten(tree, outs[num:])


def _flat(
    function: Callable[..., PyTree], args: PyTree, platform: str | None
) -> tuple[Any, tuple, Any]:
    """Returns (flat jaxpr of constants and arguments, constants, result structure)."""
    tree, found = jax.tree.structure(args), []

    def run(*leaves: Any) -> list[Any]:
        result = function(*jax.tree.unflatten(tree, leaves))
        found.append(jax.tree.structure(result))
        return jax.tree.leaves(result)

    avals = [
        x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
        for x in jax.tree.leaves(args)
    ]
    jaxpr, consts = flatten(trace(run, avals), inline_custom=True, platform=platform)
    return jaxpr, consts, found[0]
