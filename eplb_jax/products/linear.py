"""Linear layers whose three products are in float8, with what they keep for a backward.

As in the DeepSeek-V3 report (arXiv:2412.19437, section 3.3): x is quantized in tiles of
1 x 128, and kept so; the weight's gradient sums over rows, for which x is quantized
again in tiles of 128 x 1; dy is quantized in both ways. What a SwiGLU reads is kept in
float8, and its result is computed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eplb_jax.products.grouped import mask_rows
from eplb_jax.products.quantize import quantize_blocks, quantize_tiles
from eplb_jax.products.scaled import Scaled, dequantize
from eplb_jax.products.scaled_products import (
    scaled_grouped_matmul,
    scaled_matmul,
    scaled_weight_grad,
)
from eplb_jax.products.scaled_rows import (
    RowsKind,
    ScaledRows,
    cotangent_of_rows,
    one_leading_axis,
)
from eplb_jax.products.varying import vary_alike


class ScaledWeight(NamedTuple):
    """A weight in float8 that is held between steps, without a gradient.

    It is transposed: products read it along the axis that they sum over, and would copy
    it in every step.

    Attributes:
      transposed: [..., f, d] with scales of 128 x 128, of a weight [..., d, f].
    """

    transposed: Scaled

    @classmethod
    def of(cls, weight: jax.Array) -> ScaledWeight:
        """Quantizes a weight, [..., d, f]."""
        return cls(quantize_blocks(jnp.swapaxes(weight, -1, -2)))

    @property
    def matrix(self) -> Scaled:
        """The weight as products take it, [..., d, f]."""
        return self.transposed.transposed


def scaled_linear(
    rows: ScaledRows,
    weight: jax.Array | ScaledWeight,
    group_sizes: jax.Array | None = None,
) -> jax.Array:
    """Multiplies activations with a weight, or with one of each group of rows.

    Args:
      rows: [..., d]; with groups [rows, d].
      weight: [d, f], or [groups, d, f]. In bfloat16 or float32 it is quantized here,
        and its gradient is summed in float32 and rounded once; a `ScaledWeight` has
        none.
      group_sizes: as in `grouped_matmul`; None: one weight for all.

    Returns:
      [..., f], of the dtype of the activations.

    Examples:
      >>> from eplb_jax.products import scale_rows
      >>> x, w = jnp.ones((4, 256)), jnp.ones((256, 2))
      >>> scaled_linear(scale_rows(x), w)[0].tolist()
      [256.0, 256.0]
      >>> loss = lambda x, w: scaled_linear(scale_rows(x), w).sum()
      >>> dx, dw = jax.grad(loss, (0, 1))(x, w)
      >>> float(dx[0, 0]), float(dw[0, 0])
      (2.0, 4.0)
    """
    y = _linear(*vary_alike(rows.flat, weight, group_sizes))
    return y.reshape(*rows.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _linear(rows: ScaledRows, weight: jax.Array, sizes: jax.Array | None) -> jax.Array:
    return _product(rows.scaled, _blocks(weight), sizes, rows.dtype)


def _linear_forward(
    rows: ScaledRows, weight: jax.Array | ScaledWeight, sizes: jax.Array | None
) -> Any:
    # Without its handle, which would be kept, as zeros.
    kept = (rows.scaled, weight, sizes)
    return _linear(rows, weight, sizes), (kept, RowsKind(rows.powers_of_two))


def _linear_backward(saved: Any, dy: jax.Array) -> Any:
    (scaled, weight, sizes), kind = saved
    dx = _input_grad(dy, weight, sizes)
    x = dequantize(scaled)
    dw = _weight_grad(x, dy, sizes, weight, kind.powers_of_two)
    return cotangent_of_rows(dx, kind), dw, None


_linear.defvjp(_linear_forward, _linear_backward)


def scaled_swiglu(
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array | ScaledWeight,
    row_weights: jax.Array | None = None,
    group_sizes: jax.Array | None = None,
) -> jax.Array:
    """Computes `(silu(gate) * up) @ down` with the product in float8.

    `gate` and `up` are kept in float8 for the backward, and nothing else.

    Args:
      gate: [..., h]; with groups [rows, h].
      up: the same.
      down: [h, d], or [groups, h, d]; see `scaled_linear`.
      row_weights: [rows, 1] float32, factors of the rows before the product.
      group_sizes: as in `grouped_matmul`; None: one weight for all.

    Returns:
      [..., d], of the dtype of `gate`.
    """
    y = _swiglu(
        *vary_alike(
            one_leading_axis(gate), one_leading_axis(up), down, row_weights, group_sizes
        )
    )
    return y.reshape(*gate.shape[:-1], y.shape[-1])


def swiglu(
    gate: jax.Array, up: jax.Array, row_weights: jax.Array | None = None
) -> jax.Array:
    """Returns `silu(gate) * up`, times a weight for each row.

    The weights are applied here and not after the next product: there, their gradient
    would need the outputs again, which are several times as wide.
    """
    hidden = jax.nn.silu(gate) * up
    if row_weights is None:
        return hidden
    return (hidden.astype(jnp.float32) * row_weights).astype(hidden.dtype)


@jax.custom_vjp
def _swiglu(
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array | ScaledWeight,
    row_weights: jax.Array | None,
    sizes: jax.Array | None,
) -> jax.Array:
    hidden = quantize_tiles(swiglu(gate, up, row_weights))
    return _product(hidden, _blocks(down), sizes, gate.dtype)


def _swiglu_forward(
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array | ScaledWeight,
    row_weights: jax.Array | None,
    sizes: jax.Array | None,
) -> Any:
    y = _swiglu(gate, up, down, row_weights, sizes)
    kept = quantize_tiles(gate), quantize_tiles(up)
    return y, (kept, down, row_weights, sizes)


def _swiglu_backward(saved: Any, dy: jax.Array) -> Any:
    kept, down, row_weights, sizes = saved
    gate, up = (dequantize(each, dy.dtype) for each in kept)
    hidden, pullback = jax.vjp(swiglu, gate, up, row_weights)
    d_gate, d_up, d_weights = pullback(_input_grad(dy, down, sizes))
    d_down = _weight_grad(hidden, dy, sizes, down)
    return d_gate, d_up, d_down, d_weights, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _blocks(weight: jax.Array | ScaledWeight) -> Scaled:
    return (
        weight.matrix if isinstance(weight, ScaledWeight) else quantize_blocks(weight)
    )


def _product(x: Scaled, w: Scaled, sizes: jax.Array | None, dtype: Any) -> jax.Array:
    options = {"out_dtype": _result_dtype(dtype)}
    if sizes is None:
        return scaled_matmul(x, w, **options).astype(dtype)
    return scaled_grouped_matmul(x, w, sizes, **options).astype(dtype)


def _input_grad(dy: jax.Array, weight: jax.Array, sizes: jax.Array | None) -> jax.Array:
    transposed = _blocks(weight).transposed
    return _product(quantize_tiles(dy), transposed, sizes, dy.dtype)


def _weight_grad(
    x: jax.Array,
    dy: jax.Array,
    sizes: jax.Array | None,
    weight: jax.Array | ScaledWeight,
    powers_of_two: bool = False,
) -> jax.Array | None:
    """Returns the gradient of a weight, in its dtype; None if it is quantized."""
    if isinstance(weight, ScaledWeight):
        return None
    if sizes is not None:
        # Padding may hold anything, and would share scales with rows of a group.
        num_rows = sizes.sum(dtype=jnp.int32)
        x, dy = mask_rows(x, num_rows), mask_rows(dy, num_rows)
    columns = quantize_tiles(x, axis=-2, powers_of_two=powers_of_two)
    dw = scaled_weight_grad(
        columns,
        quantize_tiles(dy, axis=-2),
        sizes,
        out_dtype=_result_dtype(weight.dtype),
    )
    return dw.astype(weight.dtype)


def _result_dtype(dtype: Any) -> Any:
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
