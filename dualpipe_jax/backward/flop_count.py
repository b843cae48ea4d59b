"""Counts the floating-point operations of matrix products in a traced function.

XLA's own count visits a loop's body once and omits custom calls; here a loop's body is
multiplied by its trips. A product of [m, k] and [k, n] counts 2 m k n, as usual.
Nothing but matrix products counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dualpipe_jax import compat
from dualpipe_jax.backward.jaxprs import jaxprs_in


def flops(
    function: Callable[..., Any], *args: Any, while_trips: int = 1, **kwargs: Any
) -> int:
    """Returns the number of operations in the matrix products of a call.

    Args:
      function: any function that JAX can trace.
      *args: its arguments: pytrees of arrays or ``jax.ShapeDtypeStruct``.
      while_trips: how often to count the body of a ``while_loop``, whose number of
        trips is unknown before it runs.
      **kwargs: keyword arguments, likewise.

    Returns:
      The count: a ``jax.shard_map`` counts on all its devices, a ``cond`` by its
      costliest branch.

    Examples:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.ones((3, 3)), jnp.ones((2, 3))
      >>> flops(jnp.dot, x, w)
      36
      >>> def layers(x):
      ...     return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=10)
      >>> flops(layers, x)
      360
    """
    call = jax.make_jaxpr(lambda args, kwargs: function(*args, **kwargs))
    return jaxpr_flops(call(args, kwargs), while_trips=while_trips)


def jaxpr_flops(jaxpr: Any, *, while_trips: int = 1) -> int:
    """Returns the same for a jaxpr, closed or open; see ``flops``.

    Examples:
      >>> import jax.numpy as jnp
      >>> jaxpr_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 3))))
      36
    """
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    return sum(equation_flops(eqn, while_trips=while_trips) for eqn in jaxpr.eqns)


def equation_flops(eqn: Any, *, while_trips: int = 1) -> int:
    """Returns the same for one equation of a jaxpr."""

    def inner(jaxpr):
        return jaxpr_flops(jaxpr, while_trips=while_trips)

    params = eqn.params
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), (batch, _) = params["dimension_numbers"]
            return _product_flops(eqn, contracted, batch)
        case "ragged_dot_general":
            return _ragged_flops(eqn)
        case "conv_general_dilated":
            return _convolution_flops(eqn)
        case "scan":
            return params["length"] * inner(params["jaxpr"])
        case "while":
            body = inner(params["body_jaxpr"]) + inner(params["cond_jaxpr"])
            return while_trips * body
        case "cond":
            return max(map(inner, params["branches"]))
        case "shard_map":
            sizes = [params["mesh"].shape[axis] for axis in compat.manual_axes(eqn)]
            return math.prod(sizes) * inner(params["jaxpr"])
        case "pallas_call" if params.get("cost_estimate") is not None:
            return params["cost_estimate"].flops
        case "pallas_call":
            return math.prod(params["grid_mapping"].grid) * inner(params["jaxpr"])
        case _:
            return sum(map(inner, jaxprs_in(params)))


def _product_flops(eqn: Any, contracted: Sequence[int], batch: Sequence[int]) -> int:
    lhs, rhs = (atom.aval.shape for atom in eqn.invars)
    depth = math.prod(lhs[i] for i in contracted)
    shared = math.prod(lhs[i] for i in batch) * depth
    # Every element of lhs multiplies every column of rhs in its batch entry.
    return 2 * math.prod(lhs) * (math.prod(rhs) // shared if shared else 0)


def _ragged_flops(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = (atom.aval.shape for atom in eqn.invars[:2])
    # Each row of lhs multiplies the matrix of its group.
    used = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2 * math.prod(lhs) * math.prod(n for i, n in enumerate(rhs) if i not in used)


def _convolution_flops(eqn: Any) -> int:
    """Taps that fall on padding or between dilated inputs count too."""
    kernel = eqn.invars[1].aval.shape
    spec = eqn.params["dimension_numbers"].rhs_spec
    taps = math.prod(kernel[i] for i in spec[1:])  # input channels of a group, window
    return 2 * math.prod(eqn.outvars[0].aval.shape) * taps
