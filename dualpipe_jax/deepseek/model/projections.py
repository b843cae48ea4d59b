"""Linear layers whose products are in float8 where their input is."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx

from eplb_jax.layer import Products
from eplb_jax.products import (
    ScaledRows,
    ScaledWeight,
    dequantize,
    scale_rows,
    scaled_linear,
)


def operand(
    x: jax.Array, products: Products, *, powers_of_two: bool = False
) -> jax.Array | ScaledRows:
    """Returns the input of one or several linear layers, quantized for float8.

    Args:
      x: [..., d].
      products: see `DeepSeek`.
      powers_of_two: see `eplb_jax.quantize_tiles`.
    """
    return x if products == "plain" else scale_rows(x, powers_of_two=powers_of_two)


def project(
    linear: nnx.Linear | nnx.LinearGeneral,
    x: jax.Array | ScaledRows,
    out: tuple[int, ...],
) -> jax.Array:
    """Applies a linear layer without bias to the last axis of its input.

    Args:
      linear: its kernel has the axes of its input, which are one axis of `x`, and then
        those of its result; or it is a `ScaledWeight`, if `x` is quantized.
      x: [..., d].
      out: axes of the result.

    Returns:
      [..., *out].
    """
    kernel = linear.kernel.get_value()
    shape = (*x.shape[:-1], *out)
    if isinstance(x, ScaledRows):
        if not isinstance(kernel, ScaledWeight):
            kernel = kernel.reshape(x.shape[-1], math.prod(out))
        return scaled_linear(x, kernel).reshape(shape)
    return linear(x.reshape(*x.shape[:-1], *kernel.shape[: kernel.ndim - len(out)]))


def matrix(linear: nnx.LinearGeneral, dtype: Any) -> jax.Array:
    """Returns a layer's kernel as a matrix in this dtype, quantized or not."""
    kernel = linear.kernel.get_value()
    if isinstance(kernel, ScaledWeight):
        return dequantize(kernel.matrix, dtype)
    return kernel.reshape(kernel.shape[0], math.prod(kernel.shape[1:])).astype(dtype)
