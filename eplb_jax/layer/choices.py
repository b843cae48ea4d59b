"""One row per choice of a token: to the physical expert that it chose, and back.

Each of the two ways is the transpose of the other, so gradients take the same paths.

Shape suffixes: see `eplb_jax`; here C choices of all tokens, C = T * K.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from eplb_jax.layer.axes import Axis
from eplb_jax.layer.dispatch_plan import DispatchPlan
from eplb_jax.layer.exchange import Transport, exchange
from eplb_jax.placement import take_or_zero


def dispatch_choices(
    values: jax.Array,
    plan: DispatchPlan,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
) -> jax.Array:
    """Brings a value of each choice, such as its router weight, to its expert.

    Args:
      values: [tokens * top_k, d], choice by choice.
      plan: from `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [rows, d], in the order of the result of `dispatch_tokens`; empty rows are zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from eplb_jax.layer.dispatch_plan import plan_dispatch
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> values = jnp.array([[5.0], [6.0], [7.0], [8.0]])
      >>> dispatch_choices(values, plan).ravel().tolist()
      [6.0, 7.0, 5.0, 0.0]
    """
    return _dispatch_choices(values, plan, axis_name, transport)


def combine_choices(
    rows: jax.Array,
    plan: DispatchPlan,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
) -> jax.Array:
    """Brings results back choice by choice, for callers applying router weights.

    Args:
      rows: [rows, d], grouped by physical expert like the result of `dispatch_choices`.
      plan: from `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [tokens * top_k, d], choice by choice; zero for choices that were not sent.

    Examples:
      >>> import jax.numpy as jnp
      >>> from eplb_jax.layer.dispatch_plan import plan_dispatch
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> rows = jnp.array([[5.0], [6.0], [7.0], [8.0]])
      >>> combine_choices(rows, plan).ravel().tolist()
      [7.0, 5.0, 6.0, 0.0]
    """
    return _combine_choices(rows, plan, axis_name, transport)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dispatch_choices(
    values: jax.Array, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> jax.Array:
    return to_experts(values[plan.order], plan, axis_name, transport)


def _dispatch_choices_forward(
    values: jax.Array, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> Any:
    return _dispatch_choices(values, plan, axis_name, transport), plan


def _dispatch_choices_backward(
    axis_name: Axis | None, transport: Transport, plan: DispatchPlan, ct: jax.Array
) -> Any:
    return _combine_choices(ct, plan, axis_name, transport), None


_dispatch_choices.defvjp(_dispatch_choices_forward, _dispatch_choices_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _combine_choices(
    rows: jax.Array, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> jax.Array:
    return from_experts(rows, plan, axis_name, transport)


def _combine_choices_forward(
    rows: jax.Array, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> Any:
    return _combine_choices(rows, plan, axis_name, transport), plan


def _combine_choices_backward(
    axis_name: Axis | None, transport: Transport, plan: DispatchPlan, ct: jax.Array
) -> Any:
    return _dispatch_choices(ct, plan, axis_name, transport), None


_combine_choices.defvjp(_combine_choices_forward, _combine_choices_backward)


def to_experts(
    rows_C: jax.Array,
    plan: DispatchPlan,
    axis_name: Axis | None,
    transport: Transport,
) -> jax.Array:
    """Moves rows in the order in which they are sent to rows by physical expert.

    Args:
      rows_C: [rows sent, ...], by `plan.order`.
      plan: from `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [rows, ...]; empty rows are zero.
    """
    if axis_name is None or plan.segments is None:
        received = rows_C
    else:
        num_rows = len(plan.to_group)
        received = exchange(rows_C, plan.segments, num_rows, axis_name, transport)
    return take_or_zero(received, plan.to_group)


def from_experts(
    rows_M: jax.Array,
    plan: DispatchPlan,
    axis_name: Axis | None,
    transport: Transport,
) -> jax.Array:
    """Moves rows by physical expert to rows choice by choice.

    Args:
      rows_M: [rows, ...], grouped by physical expert.
      plan: from `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [tokens * top_k, ...]; zero for choices that were not sent.
    """
    received = take_or_zero(rows_M, plan.from_group)
    num_sent = len(plan.order)
    if axis_name is None or plan.segments is None:
        return take_or_zero(received, plan.inverse)
    back = plan.segments.reversed()
    returned = exchange(received, back, num_sent, axis_name, transport)
    return take_or_zero(returned, plan.inverse)
