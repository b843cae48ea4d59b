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

Payload = Literal["plain", "fp8"]

_TILE = 128
_LARGEST_FP8 = 448.0


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
    if payload == "fp8" and num_features % _TILE:
        raise ValueError(
            f"payload='fp8' scales tiles of {_TILE} channels, which do not divide "
            f"{num_features} features; use payload='plain'."
        )


def bytes_of_token(payload: Payload, num_features: int, dtype: Any) -> int:
    """Bytes that a token has on its way to an expert.

    Examples:
      >>> bytes_of_token("plain", 256, jnp.bfloat16), bytes_of_token("fp8", 256, None)
      (512, 264)
    """
    if payload == "fp8":
        return num_features + 4 * num_features // _TILE
    return num_features * jnp.dtype(dtype).itemsize


def pack_fp8(x_TF: jax.Array) -> jax.Array:
    """Encodes tokens as bytes: float8_e4m3fn values, then a float32 scale per tile.

    Args:
      x_TF: [tokens, d].

    Returns:
      [tokens, d + 4 * d / 128] uint8.
    """
    num_tiles = x_TF.shape[1] // _TILE
    tile_T = x_TF.astype(jnp.float32).reshape(len(x_TF), num_tiles, _TILE)
    scale_T = jnp.abs(tile_T).max(axis=-1, keepdims=True) / _LARGEST_FP8
    scale_T = jnp.where(scale_T > 0, scale_T, 1.0)
    small_T = (tile_T / scale_T).astype(jnp.float8_e4m3fn).reshape(x_TF.shape)
    # As bytes, since not every backend's collectives support the type; and in one row,
    # since a second exchange, just for the scales, would cost the network's latency.
    return jnp.concatenate(
        [lax.bitcast_convert_type(small_T, jnp.uint8), _as_bytes(scale_T[..., 0])],
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
    shape = len(bytes_M), num_features // _TILE
    small_M, scale_M = jnp.split(bytes_M, [num_features], axis=1)
    small_M = lax.bitcast_convert_type(small_M, jnp.float8_e4m3fn)
    scale_M = lax.bitcast_convert_type(scale_M.reshape(*shape, 4), jnp.float32)
    tile_M = small_M.astype(jnp.float32).reshape(*shape, _TILE) * scale_M[..., None]
    return tile_M.reshape(small_M.shape).astype(dtype)


def _as_bytes(x: jax.Array) -> jax.Array:
    """[n, m] float32 -> [n, 4 m] uint8."""
    return lax.collapse(lax.bitcast_convert_type(x, jnp.uint8), 1)
