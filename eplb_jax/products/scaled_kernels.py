"""Pallas-Triton kernels for products of float8 arrays with scales.

A program computes a tile of the result. In each step it multiplies 128 values along the
axis that is summed over, with inexact sums, and adds the result times its scales to
float32 sums (arXiv:2412.19437, section 3.3.2). Both operands lie along that axis, as
Hopper's tensor cores need it for types of 8 bits.

Shape suffixes: see `eplb_jax`; here Y entries of another row. X are programs along the
rows, Y groups and one for padding.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from eplb_jax.products.scaled import TILE, Scaled, num_tiles
from eplb_jax.products.triton_dot import float8_dot
from eplb_jax.products.varying import struct_like

# Rows of a tile of the result: few if a group has few on average, as in decoding.
_ROWS = (64, 128)


def multiply_by_tiles(
    x: Scaled, w: Scaled, sizes: jax.Array | None, *, out_dtype: Any, interpret: bool
) -> jax.Array:
    """Multiplies rows with their group's matrix; zero for padding.

    Args:
      x: [M, K] with scales of 1 x 128.
      w: [I, K, N] with scales of 128 x 128.
      sizes: [I] int32, rows of each group; None: one group of all rows.
      out_dtype: of the result.
      interpret: whether to run in Pallas' interpreter.

    Returns:
      [M, N].
    """
    (num_rows, depth), width = x.values.shape, w.values.shape[2]
    num_groups = w.values.shape[0]
    tile_rows = _ROWS[num_rows > _ROWS[0] * num_groups]
    w = w.transposed
    if sizes is None:
        programs, tables = num_tiles_of(num_rows, tile_rows), ()
    else:
        # Each group, padding included, may end in a tile that is not full.
        programs = num_rows // tile_rows + num_groups + 1
        tables = _tiles_of_groups(sizes, num_rows, tile_rows, programs)
    kernel = functools.partial(
        _rows_kernel, tile_rows=tile_rows, num_rows=num_rows, depth=depth, width=width
    )
    return _call(
        kernel,
        (num_rows, width),
        (programs, num_tiles(width)),
        (x, w),
        tables,
        out_dtype,
        interpret,
        flops=2 * num_rows * depth * width,
        num_warps=4 if tile_rows == _ROWS[0] else 8,
    )


def sum_over_rows(
    x: Scaled, dy: Scaled, sizes: jax.Array | None, *, out_dtype: Any, interpret: bool
) -> jax.Array:
    """Computes x.T @ dy over the rows of each group.

    Args:
      x: [M, K] with scales of 128 x 1.
      dy: [M, N] with scales of 128 x 1.
      sizes: [I] int32, rows of each group; None: one group of all rows.
      out_dtype: of the result.
      interpret: whether to run in Pallas' interpreter.

    Returns:
      [I, K, N].
    """
    (num_rows, depth), width = x.values.shape, dy.values.shape[1]
    tables, num_groups = (), 1
    if sizes is not None:
        ends_I = jnp.cumsum(sizes)
        tables, num_groups = (ends_I - sizes, ends_I), len(sizes)
    kernel = functools.partial(
        _sums_kernel, num_rows=num_rows, depth=depth, width=width
    )
    return _call(
        kernel,
        (num_groups, depth, width),
        (num_groups, num_tiles(depth), num_tiles(width)),
        (x.transposed, dy.transposed),
        tables,
        out_dtype,
        interpret,
        flops=2 * num_rows * depth * width,
        num_warps=8,
    )


def num_tiles_of(size: Any, tile: int) -> Any:
    """Returns how many tiles cover so many rows."""
    return (size + tile - 1) // tile


def _tiles_of_groups(
    sizes_I: jax.Array, num_rows: int, tile_rows: int, programs: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rows each program computes: of one group, or the padding after the last.

    Returns:
      group_X: the group; their number for padding.
      start_X: the first row.
      end_X: the end of the group's rows; equal to `start_X` if there is nothing to do.
    """
    padding = num_rows - sizes_I.sum(dtype=jnp.int32)
    size_Y = jnp.concatenate([sizes_I, padding[None]])
    end_Y = jnp.cumsum(size_Y)
    count_Y = -(-size_Y // tile_rows)
    last_Y = jnp.cumsum(count_Y)
    program_X = jnp.arange(programs, dtype=jnp.int32)
    is_after_XY = last_Y[None] <= program_X[:, None]
    group_X = is_after_XY.sum(axis=1, dtype=jnp.int32)
    is_used_X = group_X < len(size_Y)
    of_X = jnp.minimum(group_X, len(size_Y) - 1)
    position_X = program_X - (last_Y - count_Y)[of_X]
    start_X = (end_Y - size_Y)[of_X] + position_X * tile_rows
    start_X = jnp.where(is_used_X, start_X, 0)
    end_X = jnp.where(is_used_X, end_Y[of_X], 0)
    return jnp.minimum(group_X, len(sizes_I)), start_X, end_X


def _rows_kernel(
    *refs: Any, tile_rows: int, num_rows: int, depth: int, width: int
) -> None:
    x, w, x_scales, w_scales, *tables, y = refs
    program, column = pl.program_id(0), pl.program_id(1)
    steps = num_tiles(depth)
    if tables:
        group, start, end = (plt.load(table.at[program]) for table in tables)
        # No product for padding, whose result is zero.
        steps *= (group < w.shape[0]).astype(jnp.int32)
        group = jnp.minimum(group, w.shape[0] - 1)
        is_row = start + jnp.arange(tile_rows, dtype=jnp.int32) < end
    else:
        group, start = jnp.int32(0), program * tile_rows
        is_row = _inside(start, tile_rows, num_rows)
    rows, columns = pl.ds(start, tile_rows), pl.ds(column * TILE, TILE)
    is_column = _inside(column * TILE, TILE, width)

    def step(k: jax.Array, sums: jax.Array) -> jax.Array:
        along, is_along = pl.ds(k * TILE, TILE), _inside(k * TILE, TILE, depth)
        a = _load(x.at[rows, along], is_row, is_along)
        b = _load(w.at[group, columns, along], is_column, is_along)
        scale = _load(x_scales.at[rows, k], is_row)
        scale = scale * plt.load(w_scales.at[group, column, k])
        return sums + float8_dot(a, b.T) * scale[:, None]

    sums = jnp.zeros((tile_rows, TILE), jnp.float32)
    sums = lax.fori_loop(0, steps, step, sums)
    mask = _both(is_row, is_column, sums.shape)
    plt.store(y.at[rows, columns], sums.astype(y.dtype), mask=mask)


def _sums_kernel(*refs: Any, num_rows: int, depth: int, width: int) -> None:
    x, dy, x_scales, dy_scales, *tables, dw = refs
    group, row, column = (pl.program_id(axis) for axis in range(3))
    start, end, low, high = 0, num_rows, min, max
    if tables:
        start, end = (plt.load(table.at[group]) for table in tables)
        low, high = jnp.minimum, jnp.maximum
    rows, columns = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
    is_row = _inside(row * TILE, TILE, depth)
    is_column = _inside(column * TILE, TILE, width)

    def step(is_whole: bool, m: jax.Array, sums: jax.Array) -> jax.Array:
        along, is_along = pl.ds(m * TILE, TILE), None
        if not is_whole:
            position = m * TILE + jnp.arange(TILE, dtype=jnp.int32)
            is_along = (position >= start) & (position < end)
        a = _load(x.at[rows, along], is_row, is_along)
        b = _load(dy.at[columns, along], is_column, is_along)
        a_scale = _load(x_scales.at[rows, m], is_row)
        b_scale = _load(dy_scales.at[columns, m], is_column)
        return sums + float8_dot(a, b.T) * a_scale[:, None] * b_scale[None]

    # Tiles that belong to the group as a whole need no mask, which would slow down the
    # loads; there may be one before them and one after them.
    first, last = start // TILE, num_tiles_of(end, TILE)
    whole, after = num_tiles_of(start, TILE), end // TILE
    sums = jnp.zeros((TILE, TILE), jnp.float32)
    for is_whole, begin, stop in (
        (False, first, low(whole, last)),
        (True, whole, after),
        (False, high(whole, after), last),
    ):
        sums = lax.fori_loop(begin, stop, functools.partial(step, is_whole), sums)
    mask = _both(is_row, is_column, sums.shape)
    plt.store(dw.at[group, rows, columns], sums.astype(dw.dtype), mask=mask)


def _inside(start: Any, count: int, size: int) -> jax.Array | None:
    """Which of `count` positions are inside an axis; None if all always are."""
    if size % count == 0:
        return None
    return start + jnp.arange(count, dtype=jnp.int32) < size


def _both(
    rows: jax.Array | None, columns: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array | None:
    if rows is None and columns is None:
        return None
    mask = jnp.ones(shape, bool)
    if rows is not None:
        mask &= rows[:, None]
    if columns is not None:
        mask &= columns[None]
    return mask


def _load(
    ref: Any, rows: jax.Array | None, columns: jax.Array | None = None
) -> jax.Array:
    """Loads a tile, with zeros where it is outside of the array."""
    if len(ref.shape) == 1:
        mask = rows
    else:
        mask = _both(rows, columns, ref.shape)
    if mask is None:
        return plt.load(ref)
    return plt.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _call(
    kernel: Any,
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    factors: tuple[Scaled, Scaled],
    tables: tuple[jax.Array, ...],
    out_dtype: Any,
    interpret: bool,
    flops: int,
    num_warps: int,
) -> jax.Array:
    """Calls a kernel with the values of both factors, their scales, and the tables."""
    values, scales = zip(*factors, strict=True)
    operands = *values, *scales, *tables
    result = jax.ShapeDtypeStruct(shape, out_dtype)
    cost = pl.CostEstimate(
        flops=flops,
        transcendentals=0,
        bytes_accessed=sum(_nbytes(each) for each in (*operands, result)),
    )
    return pl.pallas_call(
        kernel,
        out_shape=struct_like(shape, out_dtype, values[0]),
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=4),
        cost_estimate=cost,
        interpret=interpret,
    )(*operands)


def _nbytes(array: Any) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize
