"""Which of several entries comes first, by comparisons.

For few entries they take less than a sort, and no loop in the program.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import jax
import numpy as np


def comes_before(size: jax.Array) -> jax.Array:
    """Tells which entries come before which, the largest first, ties in order.

    Args:
      size: [..., n].

    Returns:
      [..., n, n] bool, whether the second entry comes before the first.

    Examples:
      >>> import jax.numpy as jnp
      >>> comes_before(jnp.array([2, 5, 2])).astype(int).tolist()
      [[0, 1, 0], [0, 0, 0], [1, 1, 0]]
    """
    is_earlier = np.tri(size.shape[-1], k=-1, dtype=bool)
    is_earlier = is_earlier.reshape((1,) * (size.ndim - 1) + is_earlier.shape)
    first, second = size[..., :, None], size[..., None, :]
    return (second > first) | ((second == first) & is_earlier)
