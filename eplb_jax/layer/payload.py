"""How tokens are encoded on the wire: as they are, or in float8 with scales.

DeepSeek-V3 sends activations in tiles of 1 x 128 (arXiv:2412.19437, section 3.3.2).

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement import check_choices
from eplb_jax.products import E4M3, TILE, Scaled, dequantize, quantize_tiles

Payload = Literal["plain", "fp8"]


def check_payload(payload: Payload, num_features: int) -> None:
    """Raises unless tokens of this width can be sent in this encoding.

    Args:
      payload: `"plain"` or `"fp8"`.
      num_features: features of a token.

    Raises:
      ValueError: for an unknown payload, and for `"fp8"` if 128 does not divide the
        features.
    """
    check_choices(payload=(payload, Payload))
    if payload == "fp8" and num_features % TILE:
        raise ValueError(
            f"payload='fp8' scales tiles of {TILE} channels, which do not divide "
            f"{num_features} features; use payload='plain'."
        )


def pack_fp8(x_TF: jax.Array) -> jax.Array:
    """Encodes tokens as bytes: float8_e4m3fn values, then a float32 scale per tile.

    Args:
      x_TF: [tokens, d].

    Returns:
      [tokens, d + 4 * d / 128] uint8.
    """
    small_T, scale_T = quantize_tiles(x_TF)
    # As bytes, since not every backend's collectives support the type; and in one row,
    # since a second exchange, just for the scales, would cost the network's latency.
    return jnp.concatenate(
        [lax.bitcast_convert_type(small_T, jnp.uint8), _as_bytes(scale_T)],
        axis=1,
    )


def unpack_fp8(bytes_M: jax.Array, num_features: int, dtype: Any) -> jax.Array:
    """Decodes rows that `pack_fp8` encoded.

    Args:
      bytes_M: [rows, d + 4 * d / 128] uint8.
      num_features: d.
      dtype: of the result.

    Returns:
      [rows, d].
    """
    small_M, scale_M = jnp.split(bytes_M, [num_features], axis=1)
    small_M = lax.bitcast_convert_type(small_M, E4M3)
    scale_M = scale_M.reshape(len(bytes_M), num_features // TILE, 4)
    scale_M = lax.bitcast_convert_type(scale_M, jnp.float32)
    return dequantize(Scaled(small_M, scale_M), dtype)


def _as_bytes(x: jax.Array) -> jax.Array:
    """[n, m] float32 -> [n, 4 m] uint8."""
    return lax.collapse(lax.bitcast_convert_type(x, jnp.uint8), 1)
