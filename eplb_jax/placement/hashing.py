"""Bits that look random and are the same on every machine."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mix_bits(x: jax.Array) -> jax.Array:
    """Scrambles integers, one to one.

    The finaliser of MurmurHash3, with the multipliers of Ellis ("lowbias32").

    Args:
      x: [...] uint32.

    Returns:
      [...] uint32.

    Examples:
      >>> mix_bits(jnp.arange(3, dtype=jnp.uint32)).tolist()
      [0, 1753845952, 3507691905]
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
