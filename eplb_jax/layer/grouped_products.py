"""A matrix product per group of rows: what the experts of one device compute.

`jax.lax.ragged_dot` says the same, but XLA makes it a dense product over all groups,
on CPU and (jax 0.10) on GPU: as many times the work as there are groups. Here the
groups are walked in blocks of rows, with trip counts that depend on the group sizes:
room that a buffer holds for rows that did not come costs nothing. On GPUs tokamax's
kernels do the work where tokamax is installed.

Shape suffixes: M rows, G groups, D and F features, B rows of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.layer.kernels import has_tokamax, load_tokamax, on_cuda
from eplb_jax.layer.varying import vary_alike

Implementation = Literal["auto", "blocks", "tokamax", "xla"]

# Rows of a block: large ones while they last, for the speed of the product, and small
# ones for the rest of a group: half a small block is wasted per group, on average.
_BLOCKS = (128, 16)


def grouped_matmul(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Multiplies each group of rows with the matrix of its group.

    The first `group_sizes[0]` rows are of group 0, the next `group_sizes[1]` of group
    1, and so on. Rows after the last group are padding: whatever they hold, even NaN,
    reaches no result and no gradient, and their own result is zero. Products are
    added in float32.

    Implementations:
      - `"blocks"`: our own loops, on any backend.
      - `"tokamax"`: `tokamax.ragged_dot`, with kernels for GPUs. Inside `jax.shard_map`
        they need check_vma=False, as all Pallas kernels without type annotations.
      - `"xla"`: `jax.lax.ragged_dot`, dense in most of XLA's backends.
      - `"auto"`: when lowered for CUDA, `"tokamax"` if it is installed and has a kernel
        for the case (a process with GPUs warns if it has not), else `"blocks"`.

    Args:
      x: [rows, d] floating point.
      weight: [groups, d, f], of the same dtype.
      group_sizes: [groups] int32, not negative; their sum is at most `rows`.
      implementation: see above.

    Returns:
      [rows, f], of the dtype of `x`.

    Raises:
      ValueError: for shapes or dtypes that do not fit, for an unknown implementation,
        and for `"tokamax"` where it is not installed.

    Examples:
      >>> x = jnp.array([[1.0], [2.0], [3.0], [jnp.nan]])
      >>> weight = jnp.array([[[10.0]], [[100.0]]])
      >>> grouped_matmul(x, weight, jnp.array([1, 2])).ravel().tolist()
      [10.0, 200.0, 300.0, 0.0]
    """
    _check(x, weight, group_sizes, implementation)
    group_sizes = group_sizes.astype(jnp.int32)
    x, weight, group_sizes = vary_alike(x, weight, group_sizes)
    if implementation == "auto":
        return on_cuda(_by_tokamax, _by_blocks, x, weight, group_sizes)
    by = {"blocks": _by_blocks, "tokamax": _by_tokamax, "xla": _by_xla}
    return by[implementation](x, weight, group_sizes)


def num_block_rows(group_sizes: jax.Array) -> jax.Array:
    """Rows that `"blocks"` multiplies, its rounding up included.

    Args:
      group_sizes: [groups] int32.

    Returns:
      [] int32.

    Examples:
      >>> int(num_block_rows(jnp.array([0, 3, 130])))  # 16, and 128 + 16
      160
    """
    smallest = _BLOCKS[-1]
    return (-(-group_sizes // smallest) * smallest).sum(dtype=jnp.int32)


@jax.custom_vjp
def _by_blocks(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _product(x, weight, group_sizes, contract=1)


def _by_blocks_forward(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> Any:
    return _by_blocks(x, weight, group_sizes), (x, weight, group_sizes)


def _by_blocks_backward(saved: Any, dy: jax.Array) -> Any:
    x, weight, group_sizes = saved
    dx = _product(dy, weight, group_sizes, contract=2)
    return dx, _outer(x, dy, group_sizes, weight.dtype), None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def _product(
    x_MD: jax.Array, weight: jax.Array, sizes_G: jax.Array, contract: int
) -> jax.Array:
    """Rows times the matrix of their group, or its transpose, the padding zero."""
    num_rows, room = x_MD.shape[0], _BLOCKS[-1]
    num_out = weight.shape[3 - contract]
    ends_G = jnp.cumsum(sizes_G)
    # The last block of a group runs on into the next group, which comes later and
    # writes its own rows over it; that of the last group runs into the padding.
    x_MD = jnp.pad(x_MD, ((0, room), (0, 0)))

    def group(g: jax.Array, y_MF: jax.Array) -> jax.Array:
        weight_g = lax.dynamic_index_in_dim(weight, g, keepdims=False)

        def block(row: jax.Array, size: int, y_MF: jax.Array) -> jax.Array:
            x_BD = lax.dynamic_slice_in_dim(x_MD, row, size)
            y_BF = lax.dot_general(
                x_BD,
                weight_g,
                (((1,), (contract - 1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            return lax.dynamic_update_slice_in_dim(
                y_MF, y_BF.astype(x_MD.dtype), row, 0
            )

        return _for_blocks(num_rows, ends_G[g] - sizes_G[g], sizes_G[g], block, y_MF)

    y_MF = jnp.zeros((num_rows + room, num_out), x_MD.dtype)
    y_MF, _ = vary_alike(y_MF, x_MD)
    y_MF = lax.fori_loop(0, len(sizes_G), group, y_MF)[:num_rows]
    return _mask(y_MF, ends_G[-1])


def _outer(
    x_MD: jax.Array, dy_MF: jax.Array, sizes_G: jax.Array, dtype: Any
) -> jax.Array:
    """x.T @ dy over the rows of each group."""
    num_rows = x_MD.shape[0]
    ends_G = jnp.cumsum(sizes_G)
    x_MD, dy_MF = (jnp.pad(v, ((0, _BLOCKS[-1]), (0, 0))) for v in (x_MD, dy_MF))
    shape = (len(sizes_G), x_MD.shape[1], dy_MF.shape[1])

    def group(g: jax.Array, dw_GDF: jax.Array) -> jax.Array:
        def block(row: jax.Array, size: int, dw_DF: jax.Array) -> jax.Array:
            # Both, since 0 times the NaN of a neighbour is NaN.
            x_BD, dy_BF = (
                _mask(lax.dynamic_slice_in_dim(v, row, size), ends_G[g] - row)
                for v in (x_MD, dy_MF)
            )
            return dw_DF + lax.dot_general(
                x_BD,
                dy_BF,
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        dw_DF, _ = vary_alike(jnp.zeros(shape[1:], jnp.float32), x_MD)
        dw_DF = _for_blocks(num_rows, ends_G[g] - sizes_G[g], sizes_G[g], block, dw_DF)
        return lax.dynamic_update_index_in_dim(dw_GDF, dw_DF.astype(dtype), g, 0)

    dw_GDF, _ = vary_alike(jnp.zeros(shape, dtype), x_MD)
    return lax.fori_loop(0, shape[0], group, dw_GDF)


def _for_blocks(
    capacity: int,
    row: jax.Array,
    num_rows: jax.Array,
    block: Callable[[jax.Array, int, jax.Array], jax.Array],
    carry: jax.Array,
) -> jax.Array:
    # A buffer that is shorter than a block holds no whole one.
    sizes = [size for size in _BLOCKS[:-1] if size <= capacity] + [_BLOCKS[-1]]
    for size in sizes:
        is_last = size == _BLOCKS[-1]
        trips = -(-num_rows // size) if is_last else num_rows // size
        carry = lax.fori_loop(
            0,
            trips,
            lambda j, c, row=row, size=size: block(row + j * size, size, c),
            carry,
        )
        row, num_rows = row + trips * size, num_rows - trips * size
    return carry


def _by_tokamax(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    tokamax = load_tokamax()
    num_rows = group_sizes.sum(dtype=jnp.int32)
    product = functools.partial(
        tokamax.ragged_dot, _mask(x, num_rows), weight, group_sizes
    )
    # Its own choice may be the dense product. Its Triton kernels also compile for a
    # mesh without GPUs; which kernels an installation has depends on its version.
    try:
        y = product(implementation="triton")
    except ValueError as error:
        if "Unknown implementation" not in str(error):
            raise
        y = product(implementation="mosaic")
    return _mask(y.astype(x.dtype), num_rows)


def _by_xla(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    num_rows = group_sizes.sum(dtype=jnp.int32)
    y = lax.ragged_dot(
        _mask(x, num_rows), weight, group_sizes, preferred_element_type=jnp.float32
    )
    return _mask(y.astype(x.dtype), num_rows)


def _mask(value_MD: jax.Array, num_rows: jax.Array) -> jax.Array:
    row_M1 = jnp.arange(value_MD.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(row_M1 < num_rows, value_MD, jnp.zeros((), value_MD.dtype))


def _check(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    implementation: Implementation,
) -> None:
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"{implementation=} must be one of {', '.join(get_args(Implementation))}."
        )
    if implementation == "tokamax" and not has_tokamax():
        raise ValueError(
            f"{implementation=} is not installed; pip install tokamax, or use 'auto'."
        )
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x of shape {x.shape} and weight of shape {weight.shape} do not fit; they "
            "must be [rows, d] and [groups, d, f]."
        )
    if group_sizes.shape != weight.shape[:1]:
        raise ValueError(
            f"group_sizes has shape {group_sizes.shape}, but weight has "
            f"{weight.shape[0]} groups; give one size a group."
        )
    if x.dtype != weight.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}; both must be of one floating "
            "dtype."
        )
