"""Which parameters a run trains: gradients and optimizer state are of these only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from dualpipe_jax import compat
from dualpipe_jax.executor import PipelineParams


def trained_flags(trainable: Any, params: PipelineParams) -> PipelineParams | None:
    """Which parameters are trained: the floating ones that a config selects.

    Args:
      trainable: see `TrainConfig`.
      params: arrays, or shapes.

    Returns:
      A bool for each parameter; None if all are trained.

    Raises:
      ValueError: `trainable` does not fit the parameters, or selects none.

    Examples:
      >>> params = PipelineParams({"w": jnp.ones((2, 3)), "n": jnp.zeros(2, int)})
      >>> trained_flags(None, params).stages
      {'n': False, 'w': True}
    """
    selected, _ = params.partition(trainable)
    flags = jax.tree.map(
        lambda leaf, whole: (
            leaf is not None and jnp.issubdtype(whole.dtype, jnp.inexact)
        ),
        selected,
        params,
        is_leaf=lambda node: node is None,
    )
    if all(jax.tree.leaves(flags)):
        return None
    if not any(jax.tree.leaves(flags)):
        raise ValueError(
            f"{trainable=} selects no floating parameter, so that there is nothing to "
            "train; select some."
        )
    return flags


def prepared_flags(
    prepare: Callable[..., PipelineParams],
    flags: PipelineParams,
    params: PipelineParams,
    *args: Any,
) -> PipelineParams:
    """Which prepared parameters need gradients: those made of a trained one.

    Args:
      prepare: (params, *args) -> prepared parameters, of any structure.
      flags: from `trained_flags`.
      params: shapes.
      args: the other arguments' shapes.

    Examples:
      >>> params = PipelineParams({"w": jnp.ones((2, 3)), "v": jnp.ones((2, 3))})
      >>> flags = PipelineParams({"w": True, "v": False})
      >>> def prepare(params):
      ...     w, v = params.stages["w"], params.stages["v"]
      ...     return PipelineParams({"sum": w + v, "double": 2 * v})
      >>> prepared_flags(prepare, flags, params).stages
      {'double': False, 'sum': True}
    """
    prepared = jax.eval_shape(prepare, params, *args)
    jaxpr, _ = compat.open_jaxpr(jax.make_jaxpr(prepare)(params, *args))
    leaves = jax.tree.leaves(flags)
    reached = {
        var
        for var, is_trained in zip(jaxpr.invars[: len(leaves)], leaves, strict=True)
        if is_trained
    }
    for eqn in jaxpr.eqns:
        # Literals have no hash.
        operands = (v for v in eqn.invars if not isinstance(v, jex_core.Literal))
        if not reached.isdisjoint(operands):
            reached.update(eqn.outvars)
    found = [
        not isinstance(var, jex_core.Literal)
        and var in reached
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
        for var, leaf in zip(jaxpr.outvars, jax.tree.leaves(prepared), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(prepared), found)


def filled(trained: PipelineParams, like: PipelineParams) -> PipelineParams:
    """A tree of the trained parameters, with zeros for the others.

    XLA computes nothing of them where they are taken out again.

    Args:
      trained: the first part that `PipelineParams.partition` returns, or the like.
      like: shapes of all parameters.
    """

    def zeros(leaf: Any) -> jax.Array:
        is_floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jnp.zeros(leaf.shape, jnp.float32 if is_floating else leaf.dtype)

    return trained.combine(jax.tree.map(zeros, like))
