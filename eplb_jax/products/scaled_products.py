"""Products of float8 arrays with scales, in one way per platform.

The three products of a linear layer y = x @ w are x @ w, dy @ w.T and x.T @ dy. The
first two are `scaled_matmul`, the last is `scaled_weight_grad`; each is also there for
groups of rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement import check_choices
from eplb_jax.products.grouped import mask_rows, multiply_groups, multiply_transposed
from eplb_jax.products.scaled import TILE, Scaled, check_scaled, dequantize
from eplb_jax.products.scaled_kernels import multiply_by_tiles, sum_over_rows
from eplb_jax.products.varying import vary_alike

ScaledImplementation = Literal["auto", "kernel", "dequantized", "interpreted"]


def scaled_matmul(
    x: Scaled,
    w: Scaled,
    *,
    out_dtype: Any = jnp.bfloat16,
    implementation: ScaledImplementation = "auto",
) -> jax.Array:
    """Multiplies float8 arrays with scales.

    Each 128 products are added up by tensor cores and then, multiplied with their
    scales, in float32. It has no derivative; see `eplb_jax.products.linear` for that.

    Implementations:
      - `"kernel"`: a Pallas-Triton kernel, for NVIDIA GPUs of compute capability 8.9 or
        more. It reads the weight along K: a weight that is quantized in the same
        program is written so, another one is copied.
      - `"dequantized"`: products of the dequantized arrays in float32.
      - `"interpreted"`: the kernel in Pallas' interpreter, for tests.
      - `"auto"`: `"kernel"` when lowered for CUDA, else `"dequantized"`.

    Args:
      x: [..., M, K] with scales of 1 x 128, from `quantize_tiles`.
      w: [K, N] with scales of 128 x 128, from `quantize_blocks`.
      out_dtype: bfloat16 or float32.
      implementation: see above.

    Returns:
      [..., M, N].

    Raises:
      ValueError: for shapes, scales or dtypes that do not match, for an unknown
        implementation, and when lowered in a process whose GPU has no float8.

    Examples:
      >>> from eplb_jax import quantize_blocks, quantize_tiles
      >>> x, w = quantize_tiles(jnp.ones((2, 200))), quantize_blocks(jnp.ones((200, 3)))
      >>> scaled_matmul(x, w).tolist()
      [[200.0, 200.0, 200.0], [200.0, 200.0, 200.0]]
    """
    _check_options(out_dtype, implementation)
    layout = "[..., M, K] with scales for 1 x 128 values"
    check_scaled("x", x, (1, TILE), layout)
    check_scaled("w", w, (TILE, TILE), "[K, N] with scales for 128 x 128 values")
    if w.values.ndim != 2 or x.values.shape[-1] != w.values.shape[0]:
        raise ValueError(
            f"x of shape {x.values.shape} and w of shape {w.values.shape} do not "
            "match; they must be [..., M, K] and [K, N]."
        )
    leading = x.values.shape[:-1]
    rows = Scaled(*(leaf.reshape(math.prod(leading), leaf.shape[-1]) for leaf in x))
    one = Scaled(*(leaf[None] for leaf in w))
    y = _multiply(rows, one, None, out_dtype, implementation)
    return y.reshape(*leading, y.shape[-1])


def scaled_grouped_matmul(
    x: Scaled,
    w: Scaled,
    group_sizes: jax.Array,
    *,
    out_dtype: Any = jnp.bfloat16,
    implementation: ScaledImplementation = "auto",
) -> jax.Array:
    """Multiplies each group of rows with the matrix of its group, in float8.

    Groups are those of `grouped_matmul`: consecutive rows, as many as the group sizes
    say, whatever they are. Rows after the last group reach no result; their own is
    zero.

    Args:
      x: [rows, K] with scales of 1 x 128, from `quantize_tiles`.
      w: [groups, K, N] with scales of 128 x 128, from `quantize_blocks`.
      group_sizes: [groups] int32, not negative; their sum is at most `rows`.
      out_dtype: bfloat16 or float32.
      implementation: see `scaled_matmul`.

    Returns:
      [rows, N].

    Raises:
      ValueError: see `scaled_matmul`.

    Examples:
      >>> from eplb_jax import quantize_blocks, quantize_tiles
      >>> x = quantize_tiles(jnp.ones((4, 256)))
      >>> w = quantize_blocks(jnp.stack([jnp.ones((256, 1)), jnp.full((256, 1), 2.0)]))
      >>> scaled_grouped_matmul(x, w, jnp.array([1, 2])).ravel().tolist()
      [256.0, 512.0, 512.0, 0.0]
    """
    _check_options(out_dtype, implementation)
    check_scaled("x", x, (1, TILE), "[rows, K] with scales for 1 x 128 values")
    layout = "[groups, K, N] with scales for 128 x 128 values"
    check_scaled("w", w, (TILE, TILE), layout)
    shapes = x.values.shape, w.values.shape
    if tuple(map(len, shapes)) != (2, 3) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"x of shape {shapes[0]} and w of shape {shapes[1]} do not match; they "
            "must be [rows, K] and [groups, K, N]."
        )
    _check_sizes(group_sizes, shapes[1][0])
    return _multiply(x, w, group_sizes.astype(jnp.int32), out_dtype, implementation)


def scaled_weight_grad(
    x: Scaled,
    dy: Scaled,
    group_sizes: jax.Array | None = None,
    *,
    out_dtype: Any = jnp.float32,
    implementation: ScaledImplementation = "auto",
) -> jax.Array:
    """Computes x.T @ dy, over all rows or over those of each group.

    Both operands have scales of 128 x 1, `quantize_tiles(..., axis=-2)`: tiles of rows,
    wherever groups begin. Rows of two groups may share a scale. Rows after the last
    group must be zero before they are quantized: their values do not matter here, but
    they share scales, too.

    Args:
      x: [rows, K].
      dy: [rows, N].
      group_sizes: [groups] int32; None: all rows are one group.
      out_dtype: bfloat16 or float32; sums are float32.
      implementation: see `scaled_matmul`.

    Returns:
      [groups, K, N], or [K, N] without groups; zero for an empty group.

    Raises:
      ValueError: see `scaled_matmul`.

    Examples:
      >>> from eplb_jax import quantize_tiles
      >>> x, dy = (quantize_tiles(jnp.ones((200, n)), axis=-2) for n in (2, 1))
      >>> scaled_weight_grad(x, dy).tolist()
      [[200.0], [200.0]]
    """
    _check_options(out_dtype, implementation)
    layout = "[rows, n] with scales for 128 x 1 values"
    check_scaled("x", x, (TILE, 1), layout)
    check_scaled("dy", dy, (TILE, 1), layout)
    if x.values.ndim != 2 or x.values.shape[0] != dy.values.shape[0]:
        raise ValueError(
            f"x of shape {x.values.shape} and dy of shape {dy.values.shape} do not "
            "match; they must be [rows, K] and [rows, N]."
        )
    sizes = None
    if group_sizes is not None:
        _check_sizes(group_sizes, len(group_sizes))
        sizes = group_sizes.astype(jnp.int32)
    num_groups = 1 if sizes is None else len(sizes)
    shape = (num_groups, x.values.shape[1], dy.values.shape[1])
    ways = {
        "kernel": functools.partial(sum_over_rows, interpret=False),
        "interpreted": functools.partial(sum_over_rows, interpret=True),
        "dequantized": _sum_dequantized,
    }
    dw = _run(ways, implementation, shape, (x, dy, sizes), out_dtype)
    return dw[0] if group_sizes is None else dw


def _multiply(
    x: Scaled,
    w: Scaled,
    sizes: jax.Array | None,
    out_dtype: Any,
    implementation: ScaledImplementation,
) -> jax.Array:
    shape = (x.values.shape[0], w.values.shape[2])
    ways = {
        "kernel": functools.partial(multiply_by_tiles, interpret=False),
        "interpreted": functools.partial(multiply_by_tiles, interpret=True),
        "dequantized": _multiply_dequantized,
    }
    return _run(ways, implementation, shape, (x, w, sizes), out_dtype)


def _run(
    ways: dict[str, Callable[..., jax.Array]],
    implementation: ScaledImplementation,
    shape: tuple[int, ...],
    args: Any,
    out_dtype: Any,
) -> jax.Array:
    args = vary_alike(*args)
    if not all(leaf.size for leaf in jax.tree.leaves(args)) or 0 in shape:
        # No rows, no groups or no features: there is nothing to add up.
        return vary_alike(jnp.zeros(shape, out_dtype), args)[0]
    made = {
        name: functools.partial(way, out_dtype=out_dtype) for name, way in ways.items()
    }
    if implementation == "auto":
        return lax.platform_dependent(
            *args, cuda=made["kernel"], default=made["dequantized"]
        )
    return made[implementation](*args)


def _multiply_dequantized(
    x: Scaled, w: Scaled, sizes: jax.Array | None, *, out_dtype: Any
) -> jax.Array:
    rows, weight = dequantize(x), dequantize(w)
    if sizes is None:
        y = jnp.matmul(rows, weight[0], precision=lax.Precision.HIGHEST)
    else:
        y = multiply_groups(rows, weight, sizes, contract=1)
    return y.astype(out_dtype)


def _sum_dequantized(
    x: Scaled, dy: Scaled, sizes: jax.Array | None, *, out_dtype: Any
) -> jax.Array:
    rows, grads = dequantize(x), dequantize(dy)
    if sizes is None:
        dw = jnp.matmul(rows.T, grads, precision=lax.Precision.HIGHEST)[None]
        return dw.astype(out_dtype)
    # What is not finite in the padding, or near it, must not reach a group.
    rows, grads = (mask_rows(v, sizes.sum(dtype=jnp.int32)) for v in (rows, grads))
    return multiply_transposed(rows, grads, sizes, jnp.dtype(out_dtype))


def _check_options(out_dtype: Any, implementation: ScaledImplementation) -> None:
    check_choices(implementation=(implementation, ScaledImplementation))
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"out_dtype={out_dtype!r} must be bfloat16 or float32.")


def _check_sizes(group_sizes: jax.Array, num_groups: int) -> None:
    if group_sizes.shape != (num_groups,):
        raise ValueError(
            f"group_sizes has shape {group_sizes.shape}, but there are {num_groups} "
            "groups; pass one size per group."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {group_sizes.dtype}; it must be int32.")
