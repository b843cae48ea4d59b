"""Linear layers whose products are in float8 where their input is."""

from __future__ import annotations

import math

import jax
from flax import nnx

from eplb_jax.layer import Products
from eplb_jax.products import ScaledRows, scale_rows, scaled_linear


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
    linear: nnx.Linear | nnx.LinearGeneral, x: jax.Array | ScaledRows
) -> jax.Array:
    """Applies a linear layer without bias to the last axis of its input.

    Args:
      linear: its kernel is [..., ...]: first the axes of its input, which are one axis
        of `x`, then those of its result.
      x: [..., d].

    Returns:
      [..., axes of the result].
    """
    kernel = linear.kernel[...]
    num_in = 1
    while math.prod(kernel.shape[:num_in]) != x.shape[-1]:
        num_in += 1
    into, out = kernel.shape[:num_in], kernel.shape[num_in:]
    if not isinstance(x, ScaledRows):
        return linear(x.reshape(*x.shape[:-1], *into))
    y = scaled_linear(x, kernel.reshape(math.prod(into), math.prod(out)))
    return y.reshape(*x.shape[:-1], *out)
