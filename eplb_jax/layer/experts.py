"""The networks of the experts, over rows that are grouped by expert.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from eplb_jax.layer.expert_weights import ExpertWeights
from eplb_jax.products import (
    Implementation,
    ScaledRows,
    grouped_matmul,
    scale_rows,
    scaled_linear,
    scaled_swiglu,
    swiglu,
    unscale_rows,
)

Products = Literal["plain", "fp8"]
# From a weight of a device's physical experts, and the dtype of the arithmetic, to that
# of its slots.
Hold = Callable[[Any, Any], Any]


def run_experts(
    rows: jax.Array | ScaledRows,
    row_weights: jax.Array | None,
    weights: ExpertWeights,
    *,
    hold: Hold,
    group_sizes: jax.Array,
    implementation: Implementation,
    refetch: bool,
) -> jax.Array:
    """Runs the experts with products in the dtype of the rows.

    Args:
      rows: [rows, d], grouped by expert.
      row_weights: [rows, 1] float32, the router's; None: they are applied elsewhere.
      weights: of the physical experts of this device.
      hold: see `Hold`; called for each matrix.
      group_sizes: [slots] int32, rows of each.
      implementation: see `grouped_matmul`.
      refetch: whether the backward pass calls `hold` again instead of keeping what it
        returned.

    Returns:
      [rows, d].
    """
    plain = unscale_rows(rows)

    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        weight = hold(weight, x.dtype).astype(x.dtype)
        return grouped_matmul(x, weight, group_sizes, implementation=implementation)

    if refetch:
        # Keeps the rows alone.
        multiply = jax.checkpoint(multiply)
    gate, up = multiply(plain, weights.gate), multiply(plain, weights.up)
    return multiply(swiglu(gate, up, row_weights), weights.down)


def run_scaled_experts(
    rows: jax.Array | ScaledRows,
    row_weights: jax.Array | None,
    weights: ExpertWeights,
    *,
    hold: Hold,
    group_sizes: jax.Array,
    implementation: Implementation,
    refetch: bool,
) -> jax.Array:
    """Runs the experts with products in float8; see `run_experts`.

    Rows that arrive in float8 are multiplied as they are.
    """
    del implementation
    scaled = scale_rows(rows)

    def multiply(x: ScaledRows, weight: jax.Array) -> jax.Array:
        return scaled_linear(x, hold(weight, x.dtype), group_sizes)

    def multiply_last(gate: jax.Array, up: jax.Array, weight: jax.Array) -> jax.Array:
        held = hold(weight, gate.dtype)
        return scaled_swiglu(gate, up, held, row_weights, group_sizes)

    if refetch:
        # Of the last product this keeps the arguments, not in float8.
        multiply, multiply_last = map(jax.checkpoint, (multiply, multiply_last))
    gate, up = multiply(scaled, weights.gate), multiply(scaled, weights.up)
    return multiply_last(gate, up, weights.down)


def run_network(
    x: jax.Array | ScaledRows, weights: ExpertWeights, *, products: Products
) -> jax.Array:
    """Runs one SwiGLU network on all rows.

    Args:
      x: [..., d]; quantized only if the products are float8.
      weights: [d, hidden] and [hidden, d].
      products: see `MoE`.

    Returns:
      [..., d].
    """
    if products == "fp8":
        rows = scale_rows(x)
        gate, up = (scaled_linear(rows, each) for each in (weights.gate, weights.up))
        return scaled_swiglu(gate, up, weights.down)
    assert isinstance(x, jax.Array)
    gate, up, down = (each.astype(x.dtype) for each in weights)
    return swiglu(x @ gate, x @ up) @ down
