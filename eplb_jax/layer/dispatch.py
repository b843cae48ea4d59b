"""Tokens to the physical experts that they chose, and the experts' outputs back.

`plan_dispatch` turns the physical expert of every choice into a `DispatchPlan`. By that
plan `dispatch_tokens` brings tokens to their physical experts, grouped by expert, and
`combine` sums the results where the tokens are; `dispatch_choices` and
`combine_choices` of `eplb_jax.layer.choices` do the same with one row per choice. In
both pairs each function is the transpose of the other, so gradients take the same
paths. Nothing is dropped unless a buffer is smaller than what may arrive; choices that
then do not fit count as overflow, and their results are zero.

Shape suffixes: see `eplb_jax`; here C choices of all tokens, C = T * K.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from eplb_jax.layer.axes import Axis
from eplb_jax.layer.choices import from_experts, to_experts
from eplb_jax.layer.dispatch_plan import DispatchPlan
from eplb_jax.layer.exchange import Transport
from eplb_jax.layer.payload import Payload, check_payload, pack, unpack
from eplb_jax.products import ScaledRows, rows_of, scale_rows, unscale_rows


def dispatch_tokens(
    x: jax.Array,
    plan: DispatchPlan,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
    payload: Payload = "plain",
) -> jax.Array:
    """Brings each token to the physical experts that it chose.

    Args:
      x: [tokens, d].
      plan: from `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.
      payload: `"fp8"` sends float8_e4m3fn with a float32 scale for every 128
        channels; gradients come back in their own dtype.

    Returns:
      [rows, d], grouped by the physical experts of this device; empty rows are zero.

    Raises:
      ValueError: for an unknown payload or transport, and for `"fp8"` if 128 does not
        divide d.

    Examples:
      >>> from eplb_jax.layer.dispatch_plan import plan_dispatch
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> dispatch_tokens(jnp.array([[1.0], [2.0]]), plan).ravel().tolist()
      [1.0, 2.0, 1.0, 0.0]
    """
    check_payload(payload, x.shape[1])
    if payload == "plain":
        return _dispatch_tokens(x, plan, axis_name, transport)
    rows = dispatch_scaled(
        scale_rows(x), plan, axis_name=axis_name, transport=transport
    )
    return unscale_rows(rows)


def dispatch_scaled(
    x: ScaledRows,
    plan: DispatchPlan,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
) -> ScaledRows:
    """Brings each token in float8 to the physical experts that it chose.

    Args:
      x: [tokens, d], a multiple of 128.
      plan: from `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [rows, d], as in `dispatch_tokens`; quantized as they were. Gradients come back in
      the dtype of the tokens.
    """
    return _dispatch_scaled(x, plan, axis_name, transport)


def combine(
    rows: jax.Array,
    plan: DispatchPlan,
    num_tokens: int,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
) -> jax.Array:
    """Brings the experts' results back to their tokens, and sums them.

    Args:
      rows: [rows, d], grouped by physical expert like the result of `dispatch_tokens`.
      plan: from `plan_dispatch`.
      num_tokens: tokens of this device.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [tokens, d], the sum over each token's choices, taken in float32; choices that
      were not sent add nothing.

    Examples:
      >>> from eplb_jax.layer.dispatch_plan import plan_dispatch
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> combine(jnp.array([[5.0], [6.0], [7.0], [8.0]]), plan, 2).ravel().tolist()
      [12.0, 6.0]
    """
    return _combine(rows, plan, num_tokens, axis_name, transport)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dispatch_tokens(
    x: jax.Array, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> jax.Array:
    return _to_tokens_experts(x, plan, axis_name, transport)


def _to_tokens_experts(
    x: jax.Array, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> jax.Array:
    token_C = plan.order // max(1, _top_k(plan, len(x)))
    return to_experts(x[token_C], plan, axis_name, transport)


def _dispatch_tokens_forward(
    x: jax.Array, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> Any:
    return _dispatch_tokens(x, plan, axis_name, transport), (plan, len(x))


def _dispatch_tokens_backward(
    axis_name: Axis | None, transport: Transport, saved: Any, ct: jax.Array
) -> Any:
    plan, num_tokens = saved
    with jax.named_scope("dispatch"):
        return _sum_choices(ct, plan, num_tokens, axis_name, transport), None


_dispatch_tokens.defvjp(_dispatch_tokens_forward, _dispatch_tokens_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dispatch_scaled(
    x: ScaledRows, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> ScaledRows:
    bytes_M = _to_tokens_experts(pack(x.scaled), plan, axis_name, transport)
    return rows_of(unpack(bytes_M, x.shape[1]), x.dtype, x.powers_of_two)


def _dispatch_scaled_forward(
    x: ScaledRows, plan: DispatchPlan, axis_name: Axis | None, transport: Transport
) -> Any:
    return _dispatch_scaled(x, plan, axis_name, transport), (plan, x.shape[0])


def _dispatch_scaled_backward(
    axis_name: Axis | None, transport: Transport, saved: Any, ct: ScaledRows
) -> Any:
    handle, _ = _dispatch_tokens_backward(axis_name, transport, saved, ct.handle)
    return dataclasses.replace(ct, scaled=None, handle=handle), None


_dispatch_scaled.defvjp(_dispatch_scaled_forward, _dispatch_scaled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _combine(
    rows: jax.Array,
    plan: DispatchPlan,
    num_tokens: int,
    axis_name: Axis | None,
    transport: Transport,
) -> jax.Array:
    return _sum_choices(rows, plan, num_tokens, axis_name, transport)


def _combine_forward(
    rows: jax.Array,
    plan: DispatchPlan,
    num_tokens: int,
    axis_name: Axis | None,
    transport: Transport,
) -> Any:
    return _combine(rows, plan, num_tokens, axis_name, transport), plan


def _combine_backward(
    num_tokens: int,
    axis_name: Axis | None,
    transport: Transport,
    plan: DispatchPlan,
    ct: jax.Array,
) -> Any:
    del num_tokens
    with jax.named_scope("combine"):
        return _dispatch_tokens(ct, plan, axis_name, transport), None


_combine.defvjp(_combine_forward, _combine_backward)


def _sum_choices(
    rows_M: jax.Array,
    plan: DispatchPlan,
    num_tokens: int,
    axis_name: Axis | None,
    transport: Transport,
) -> jax.Array:
    """Rows by physical expert -> for each token, the sum over its choices."""
    row_C = from_experts(rows_M, plan, axis_name, transport)
    top_k = _top_k(plan, num_tokens)
    row_TKF = row_C.reshape(num_tokens, top_k, *rows_M.shape[1:])
    return row_TKF.sum(axis=1, dtype=jnp.float32).astype(rows_M.dtype)


def _top_k(plan: DispatchPlan, num_tokens: int) -> int:
    """Choices per token; 0 for a batch without tokens, whose plan does not tell."""
    return len(plan.inverse) // max(1, num_tokens)
