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
from eplb_jax.products import E4M3, TILE, Scaled

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


def bytes_of_token(payload: Payload, num_features: int, dtype: Any) -> int:
    """Bytes that a token has on its way to an expert.

    Examples:
      >>> bytes_of_token("plain", 256, jnp.bfloat16), bytes_of_token("fp8", 256, None)
      (512, 264)
    """
    if payload == "fp8":
        return num_features + 4 * num_features // TILE
    return num_features * jnp.dtype(dtype).itemsize


def pack(scaled: Scaled) -> jax.Array:
    """Encodes tokens in float8 as bytes: the values, then a float32 scale per tile.

    Args:
      scaled: [tokens, d], from `quantize_tiles`.

    Returns:
      [tokens, d + 4 * d / 128] uint8.
    """
    # As bytes, since not every backend's collectives support the type; and in one row,
    # since a second exchange, just for the scales, would cost the network's latency.
    values_T = lax.bitcast_convert_type(scaled.values, jnp.uint8)
    return jnp.concatenate([values_T, _as_bytes(scaled.scales)], axis=1)


def unpack(bytes_M: jax.Array, num_features: int) -> Scaled:
    """Decodes rows that `pack` encoded; a row of zeros is zero.

    Args:
      bytes_M: [rows, d + 4 * d / 128] uint8.
      num_features: d.

    Returns:
      [rows, d].
    """
    values_M, scales_M = jnp.split(bytes_M, [num_features], axis=1)
    scales_M = scales_M.reshape(len(bytes_M), num_features // TILE, 4)
    return Scaled(
        lax.bitcast_convert_type(values_M, E4M3),
        lax.bitcast_convert_type(scales_M, jnp.float32),
    )


def _as_bytes(x: jax.Array) -> jax.Array:
    """[n, m] float32 -> [n, 4 m] uint8."""
    return lax.collapse(lax.bitcast_convert_type(x, jnp.uint8), 1)
