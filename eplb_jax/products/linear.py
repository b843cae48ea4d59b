"""Linear layers whose three products are in float8, with what they keep for a backward.

As in the DeepSeek-V3 report (arXiv:2412.19437, section 3.3): x is quantized in tiles of
1 x 128, and kept so; the weight's gradient sums over rows, for which x is quantized
again in tiles of 128 x 1; dy is quantized in both ways. What a SwiGLU reads is kept in
float8, and its result is computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eplb_jax.products.grouped import mask_rows
from eplb_jax.products.quantize import quantize_blocks, quantize_tiles
from eplb_jax.products.scaled import Scaled, dequantize
from eplb_jax.products.scaled_products import (
    scaled_grouped_matmul,
    scaled_matmul,
    scaled_weight_grad,
)
from eplb_jax.products.varying import vary_alike


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scaled", "handle"],
    meta_fields=["powers_of_two"],
)
@dataclasses.dataclass(frozen=True)
class ScaledRows:
    """Activations in float8 that can be differentiated.

    Cotangents have the dtype of what they belong to, and float8 would not do for them.
    So there is a handle, of the dtype of the activations, for their cotangent alone:
    its values are zeros that nothing reads, and no compiled program has them.

    Attributes:
      scaled: [..., d] with scales of 1 x 128.
      handle: [..., d] zeros.
      powers_of_two: whether the scales are powers of two.
    """

    scaled: Scaled
    handle: jax.Array
    powers_of_two: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the activations."""
        return self.handle.shape

    def __len__(self) -> int:
        return len(self.handle)

    @property
    def dtype(self) -> Any:
        """The dtype of the activations."""
        return self.handle.dtype

    @property
    def flat(self) -> ScaledRows:
        """The same with one leading axis."""
        scaled = Scaled(*map(_flat, self.scaled))
        return dataclasses.replace(self, scaled=scaled, handle=_flat(self.handle))


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def scale_rows(x: jax.Array, *, powers_of_two: bool = False) -> ScaledRows:
    """Quantizes activations for any number of products; differentiable.

    Args:
      x: [..., d].
      powers_of_two: see `quantize_tiles`.
    """
    return _scale_rows(powers_of_two, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scale_rows(powers_of_two: bool, x: jax.Array) -> ScaledRows:
    scaled = quantize_tiles(x, powers_of_two=powers_of_two)
    return rows_of(scaled, x.dtype, powers_of_two)


_scale_rows.defvjp(
    lambda powers_of_two, x: (_scale_rows(powers_of_two, x), None),
    lambda powers_of_two, saved, ct: (ct.handle,),
)


def rows_of(scaled: Scaled, dtype: Any, powers_of_two: bool = False) -> ScaledRows:
    """Returns activations that are quantized already.

    Args:
      scaled: [..., d] with scales of 1 x 128.
      dtype: of the activations.
      powers_of_two: whether the scales are powers of two.
    """
    handle = jnp.zeros(scaled.values.shape, dtype)
    return ScaledRows(scaled, vary_alike(handle, scaled)[0], powers_of_two)


def named_rows(rows: ScaledRows, name: str) -> ScaledRows:
    """Names the values and scales of rows, for policies of `jax.checkpoint`."""
    return dataclasses.replace(rows, scaled=checkpoint_name(rows.scaled, name))


@jax.custom_vjp
def unscale_rows(rows: ScaledRows) -> jax.Array:
    """Returns the activations in their dtype; differentiable."""
    return dequantize(rows.scaled, rows.dtype)


def _unscale_rows_forward(rows: ScaledRows) -> Any:
    return unscale_rows(rows), _Static(rows.powers_of_two)


def _unscale_rows_backward(static: _Static, ct: jax.Array) -> Any:
    return (_cotangent(ct, static),)


unscale_rows.defvjp(_unscale_rows_forward, _unscale_rows_backward)


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
      >>> x, w = jnp.ones((4, 256)), jnp.ones((256, 2))
      >>> scaled_linear(scale_rows(x), w)[0].tolist()
      [256.0, 256.0]
      >>> loss = lambda x, w: scaled_linear(scale_rows(x), w).sum()
      >>> dx, dw = jax.grad(loss, (0, 1))(x, w)
      >>> float(dx[0, 0]), float(dw[0, 0])
      (2.0, 4.0)
    """
    flat, weight, sizes = vary_alike(rows.flat, weight, group_sizes)
    y = _linear(flat, weight, sizes)
    return y.reshape(*rows.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _linear(rows: ScaledRows, weight: jax.Array, sizes: jax.Array | None) -> jax.Array:
    return _product(rows.scaled, _blocks(weight), sizes, rows.dtype)


def _linear_forward(
    rows: ScaledRows, weight: jax.Array | ScaledWeight, sizes: jax.Array | None
) -> Any:
    # Without its handle, which would be kept, as zeros.
    kept = (rows.scaled, weight, sizes)
    return _linear(rows, weight, sizes), (kept, _Static(rows.powers_of_two))


def _linear_backward(saved: Any, dy: jax.Array) -> Any:
    (scaled, weight, sizes), static = saved
    dx = _input_grad(dy, weight, sizes)
    x = dequantize(scaled)
    dw = _weight_grad(x, dy, sizes, weight, static.powers_of_two)
    return _cotangent(dx, static), dw, None


_linear.defvjp(_linear_forward, _linear_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What a backward must know of its forward, beside arrays."""

    powers_of_two: bool


def _cotangent(ct: jax.Array, static: _Static) -> ScaledRows:
    """Returns the cotangent of rows: that of their handle alone."""
    return ScaledRows(None, ct, static.powers_of_two)  # pyright: ignore


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
    y = _swiglu(*vary_alike(_flat(gate), _flat(up), down, row_weights, group_sizes))
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
