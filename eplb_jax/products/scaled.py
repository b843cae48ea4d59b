"""Arrays in float8 with a float32 scale for each tile of their values.

Tiles of 1 x 128 for activations and gradients and blocks of 128 x 128 for weights, as
in the DeepSeek-V3 report (arXiv:2412.19437, section 3.3.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TILE = 128  # values along an axis that share a scale
E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # of e4m3


class Scaled(NamedTuple):
    """An array as `values * scales`, where a tile of values shares a scale.

    An axis of `scales` is as long as that of `values`, or it has one entry for every
    128 values, the last of which may be for fewer.

    Attributes:
      values: [...] float8_e4m3fn.
      scales: [...] float32, of the same rank.
    """

    values: Any
    scales: Any

    @property
    def transposed(self) -> Scaled:
        """The array with its last two axes exchanged.

        Examples:
          >>> w = Scaled(jnp.zeros((256, 128), E4M3), jnp.ones((2, 1)))
          >>> w.transposed.values.shape, w.transposed.scales.shape
          ((128, 256), (1, 2))
        """
        return Scaled(*(jnp.swapaxes(leaf, -1, -2) for leaf in self))


def num_tiles(size: int) -> int:
    """Returns the number of scales of so many values along an axis."""
    return -(-size // TILE)


def expand(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the scale of each value of an array of this shape.

    Examples:
      >>> expand(jnp.array([2.0, 3.0]), (130,))[126:].tolist()
      [2.0, 2.0, 3.0, 3.0]
    """
    for axis, size in enumerate(shape):
        if scales.shape[axis] == size:
            continue
        count = scales.shape[axis]
        parts = (*scales.shape[: axis + 1], TILE, *scales.shape[axis + 1 :])
        scales = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), parts)
        whole = (*parts[:axis], count * TILE, *parts[axis + 2 :])
        scales = jax.lax.slice_in_dim(scales.reshape(whole), 0, size, axis=axis)
    return scales


def dequantize(x: Scaled, dtype: Any = jnp.float32) -> jax.Array:
    """Returns `values * scales`.

    Args:
      x: see `Scaled`.
      dtype: of the result; the product is taken in float32.

    Examples:
      >>> dequantize(Scaled(jnp.ones((1, 2), E4M3), jnp.full((1, 1), 3.0))).tolist()
      [[3.0, 3.0]]
    """
    values = x.values.astype(jnp.float32) * expand(x.scales, x.values.shape)
    return values.astype(dtype)


def check_scaled(name: str, x: Any, tiles: tuple[int, ...], layout: str) -> None:
    """Raises unless an argument is a `Scaled` with such tiles.

    Args:
      name: of the argument.
      x: its value.
      tiles: for each of the last axes, 1 or 128 values that share a scale.
      layout: the shapes in words, for the message.

    Raises:
      ValueError: naming the argument, its shapes and those that are right.
    """
    if not isinstance(x, Scaled):
        raise ValueError(
            f"{name} is {type(x).__name__}, not a Scaled; quantize it with "
            "quantize_tiles or quantize_blocks."
        )
    shape = x.values.shape
    if x.values.dtype != E4M3 or x.scales.dtype != jnp.float32:
        raise ValueError(
            f"{name} has values of {x.values.dtype} and scales of {x.scales.dtype}; "
            "they must be float8_e4m3fn and float32, as quantize_tiles and "
            "quantize_blocks make them."
        )
    if len(shape) < len(tiles):
        raise ValueError(f"{name} has values of shape {shape}; they must be {layout}.")
    last = zip(shape[len(shape) - len(tiles) :], tiles, strict=True)
    want = tuple(size if tile == 1 else num_tiles(size) for size, tile in last)
    want = shape[: len(shape) - len(tiles)] + want
    if x.scales.shape != want:
        raise ValueError(
            f"{name} has scales of shape {x.scales.shape} for values of {shape}; they "
            f"must be {want}: {layout}."
        )
