"""From floating-point arrays to float8 with a scale for each tile.

Reductions and elementwise operations only: XLA fuses them with what computes the array,
and with a transposition of the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from eplb_jax.products.scaled import E4M3, LARGEST, TILE, Scaled, expand, num_tiles


def quantize_tiles(
    x: jax.Array, *, axis: int = -1, powers_of_two: bool = False
) -> Scaled:
    """Quantizes activations or gradients, with a scale for every 128 values of an axis.

    The largest finite value of a tile becomes 448, the largest of e4m3. A tile of zeros
    has the scale 1. A value that is not finite becomes NaN, and does not affect the
    rest of its tile.

    Args:
      x: [..., n] floating point; with `axis=-2`, [..., n, m].
      axis: along which tiles lie, the one that a product sums over: -1, or -2 for the
        operands of a weight's gradient.
      powers_of_two: whether scales are rounded up to powers of two. Then quantizing the
        result along the other axis loses nothing but values that are too small.

    Returns:
      A `Scaled`: values like `x`, scales [..., ceil(n / 128)], or
      [..., ceil(n / 128), m].

    Raises:
      ValueError: `x` is not floating point or has no such axis.

    Examples:
      >>> x = quantize_tiles(jnp.array([[1.0, -2.0, 0.5]]))
      >>> x.values.tolist(), x.scales.tolist()
      ([[224.0, -448.0, 112.0]], [[0.004464285913854837]])
    """
    if axis not in (-1, -2):
        raise ValueError(f"{axis=} must be -1 or -2.")
    tiles = (TILE,) if axis == -1 else (TILE, 1)
    return _quantize("x", x, tiles, powers_of_two)


def quantize_blocks(w: jax.Array, *, powers_of_two: bool = False) -> Scaled:
    """Quantizes weights, with a scale for each block of 128 x 128.

    Values are quantized as by `quantize_tiles`. The blocks of the transposed weight are
    the blocks transposed, so a product and that of its gradient read the same values.

    Args:
      w: [..., n, m] floating point.
      powers_of_two: see `quantize_tiles`.

    Returns:
      A `Scaled`: values like `w`, scales [..., ceil(n / 128), ceil(m / 128)].

    Raises:
      ValueError: `w` is not floating point or not a matrix.

    Examples:
      >>> w = quantize_blocks(jnp.ones((256, 130)))
      >>> w.values.shape, w.scales.shape
      ((256, 130), (2, 2))
    """
    return _quantize("w", w, (TILE, TILE), powers_of_two)


def _quantize(
    name: str, x: jax.Array, tiles: tuple[int, ...], powers_of_two: bool
) -> Scaled:
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < len(tiles):
        raise ValueError(
            f"{name} is {x.dtype}{list(x.shape)}; it must be floating point, with at "
            f"least {len(tiles)} axes."
        )
    exact = x.astype(jnp.float32)
    # If the values are transposed next, XLA would transpose this too, in float32.
    sizes = with_layout_constraint(jnp.abs(exact), Layout(tuple(range(x.ndim))))
    scales = _largest(jnp.where(sizes < jnp.inf, sizes, 0.0), tiles) / LARGEST
    if powers_of_two:
        # Adds to the exponent unless the mantissa is zero, which is cut off.
        bits = jax.lax.bitcast_convert_type(scales, jnp.int32)
        bits = (bits + 0x7FFFFF) & 0x7F800000
        scales = jax.lax.bitcast_convert_type(bits, jnp.float32)
    scales = jnp.where(scales > 0, scales, 1.0)
    scaled = exact / expand(scales, x.shape)
    # Rounded scales of the smallest numbers would exceed the largest value. And what is
    # infinite becomes NaN by arithmetic: XLA would keep a mask of it in memory.
    values = jnp.clip(scaled, -LARGEST, LARGEST) + (scaled - scaled)
    return Scaled(values.astype(E4M3), scales)


def _largest(x: jax.Array, tiles: tuple[int, ...]) -> jax.Array:
    """Returns the largest value of each tile; values are not negative."""
    first = x.ndim - len(tiles)
    for axis, tile in enumerate(tiles, first):
        if tile == 1:
            continue
        count, size = num_tiles(x.shape[axis]), x.shape[axis]
        if missing := count * TILE - size:
            padding = [(0, 0)] * x.ndim
            padding[axis] = (0, missing)
            x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], count, TILE, *x.shape[axis + 1 :])
        x = x.max(axis=axis + 1)
    return x
