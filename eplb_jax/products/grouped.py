"""A matrix product per group of rows: what the experts of one device compute.

`jax.lax.ragged_dot` has the same meaning, but XLA compiles it to a dense product over
all groups, on CPU and (jax 0.10) on GPU: the work times the number of groups. Here a
loop goes over the groups in blocks of rows, with trip counts that depend on the group
sizes, so empty rows of a buffer cost nothing. On GPUs tokamax's kernels are used if
tokamax is installed.

Shape suffixes: see `eplb_jax`; here B rows of a block. The groups are I, one per
physical expert of this device. F and H are those of a gate or up product; in a down
product they change places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.placement import check_choices
from eplb_jax.products.kernels import has_tokamax, load_tokamax, on_cuda
from eplb_jax.products.varying import vary_alike

Implementation = Literal["auto", "blocks", "tokamax", "xla"]

# Rows of a block: large ones while they fit, for the speed of the product, then small
# ones for the rest of a group; on average half a small block is wasted per group.
_BLOCKS = (128, 16)


def grouped_matmul(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Multiplies each group of rows with the matrix of its group.

    The first `group_sizes[0]` rows are group 0, the next `group_sizes[1]` are group 1,
    and so on. Rows after the last group are padding: their values, even NaN, reach no
    result and no gradient, and their own result is zero. Products accumulate in
    float32.

    Implementations:
      - `"blocks"`: loops over blocks of rows, on any backend.
      - `"tokamax"`: `tokamax.ragged_dot`, with kernels for GPUs. Inside `jax.shard_map`
        they need check_vma=False, like all Pallas kernels without type annotations.
      - `"xla"`: `jax.lax.ragged_dot`, dense on most of XLA's backends.
      - `"auto"`: when lowered for CUDA, `"tokamax"` if it is installed and has a kernel
        for the case (a process with GPUs warns if it has none), else `"blocks"`.

    Args:
      x: [rows, d] floating point.
      weight: [groups, d, f], of the same dtype.
      group_sizes: [groups] int32, not negative; their sum is at most `rows`.
      implementation: see above.

    Returns:
      [rows, f], of the dtype of `x`. The gradient of the matrix of an empty group is
      zero.

    Raises:
      ValueError: for shapes or dtypes that do not match, for an unknown implementation,
        and for `"tokamax"` if it is not installed.

    Examples:
      >>> x = jnp.array([[1.0], [2.0], [3.0], [jnp.nan]])
      >>> weight = jnp.array([[[10.0]], [[100.0]]])
      >>> grouped_matmul(x, weight, jnp.array([1, 2])).ravel().tolist()
      [10.0, 200.0, 300.0, 0.0]
    """
    _check(x, weight, group_sizes, implementation)
    group_sizes = group_sizes.astype(jnp.int32)
    x, weight, group_sizes = vary_alike(x, weight, group_sizes)
    if not x.size or not weight.size:
        # No rows, no groups or no features: there is nothing to add up.
        nothing = jnp.zeros((x.shape[0], weight.shape[2]), x.dtype)
        return vary_alike(nothing, x)[0]
    if implementation == "auto":
        return on_cuda(_by_tokamax, _by_blocks, x, weight, group_sizes)
    by = {"blocks": _by_blocks, "tokamax": _by_tokamax, "xla": _by_xla}
    return by[implementation](x, weight, group_sizes)


def num_block_rows(group_sizes: jax.Array) -> jax.Array:
    """Counts the rows that `"blocks"` multiplies, including its rounding up.

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
    return multiply_groups(x, weight, group_sizes, contract=1)


def _by_blocks_forward(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> Any:
    return _by_blocks(x, weight, group_sizes), (x, weight, group_sizes)


def _by_blocks_backward(saved: Any, dy: jax.Array) -> Any:
    x, weight, group_sizes = saved
    dx = multiply_groups(dy, weight, group_sizes, contract=2)
    return dx, multiply_transposed(x, dy, group_sizes, weight.dtype), None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def multiply_groups(
    x_MF: jax.Array, weight: jax.Array, sizes_I: jax.Array, contract: int
) -> jax.Array:
    """Multiplies rows with their group's matrix or its transpose; zero for padding."""
    num_rows, room = x_MF.shape[0], _BLOCKS[-1]
    num_out = weight.shape[3 - contract]
    ends_I = jnp.cumsum(sizes_I)
    # The last block of a group extends into the next group, which is computed later and
    # overwrites these rows; that of the last group extends into the padding.
    x_MF = jnp.pad(x_MF, ((0, room), (0, 0)))

    def group(g: jax.Array, y_MH: jax.Array) -> jax.Array:
        weight_g = lax.dynamic_index_in_dim(weight, g, keepdims=False)

        def block(row: jax.Array, size: int, y_MH: jax.Array) -> jax.Array:
            x_BF = lax.dynamic_slice_in_dim(x_MF, row, size)
            y_BH = lax.dot_general(
                x_BF,
                weight_g,
                (((1,), (contract - 1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            return lax.dynamic_update_slice_in_dim(
                y_MH, y_BH.astype(x_MF.dtype), row, 0
            )

        return _for_blocks(num_rows, ends_I[g] - sizes_I[g], sizes_I[g], block, y_MH)

    y_MH = jnp.zeros((num_rows + room, num_out), x_MF.dtype)
    y_MH, _ = vary_alike(y_MH, x_MF)
    y_MH = lax.fori_loop(0, len(sizes_I), group, y_MH)[:num_rows]
    return mask_rows(y_MH, ends_I[-1])


def multiply_transposed(
    x_MF: jax.Array, dy_MH: jax.Array, sizes_I: jax.Array, dtype: Any
) -> jax.Array:
    """Computes x.T @ dy over the rows of each group."""
    num_rows = x_MF.shape[0]
    ends_I = jnp.cumsum(sizes_I)
    x_MF, dy_MH = (jnp.pad(v, ((0, _BLOCKS[-1]), (0, 0))) for v in (x_MF, dy_MH))
    shape = (len(sizes_I), x_MF.shape[1], dy_MH.shape[1])

    def group(g: jax.Array, dw_IFH: jax.Array) -> jax.Array:
        def block(row: jax.Array, size: int, dw_FH: jax.Array) -> jax.Array:
            # Both are masked: 0 times a NaN of the next group would be NaN.
            x_BF, dy_BH = (
                mask_rows(lax.dynamic_slice_in_dim(v, row, size), ends_I[g] - row)
                for v in (x_MF, dy_MH)
            )
            return dw_FH + lax.dot_general(
                x_BF,
                dy_BH,
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        dw_FH, _ = vary_alike(jnp.zeros(shape[1:], jnp.float32), x_MF)
        dw_FH = _for_blocks(num_rows, ends_I[g] - sizes_I[g], sizes_I[g], block, dw_FH)
        return lax.dynamic_update_index_in_dim(dw_IFH, dw_FH.astype(dtype), g, 0)

    dw_IFH, _ = vary_alike(jnp.zeros(shape, dtype), x_MF)
    return lax.fori_loop(0, shape[0], group, dw_IFH)


def _for_blocks(
    capacity: int,
    row: jax.Array,
    num_rows: jax.Array,
    block: Callable[[jax.Array, int, jax.Array], jax.Array],
    carry: jax.Array,
) -> jax.Array:
    # A buffer shorter than a block has no whole block.
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
    weight = _zero_grad_where_empty(weight, group_sizes)
    product = functools.partial(
        tokamax.ragged_dot, mask_rows(x, num_rows), weight, group_sizes
    )
    # tokamax's default may be the dense product. Its Triton kernels also compile for a
    # mesh without GPUs; which kernels an installation has depends on its version.
    try:
        y = product(implementation="triton")
    except ValueError as error:
        if "Unknown implementation" not in str(error):
            raise
        y = product(implementation="mosaic")
    return mask_rows(y.astype(x.dtype), num_rows)


def _by_xla(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    num_rows = group_sizes.sum(dtype=jnp.int32)
    weight = _zero_grad_where_empty(weight, group_sizes)
    y = lax.ragged_dot(
        mask_rows(x, num_rows), weight, group_sizes, preferred_element_type=jnp.float32
    )
    return mask_rows(y.astype(x.dtype), num_rows)


# Not a mask of the weights themselves, which would copy them before the kernel.
@jax.custom_vjp
def _zero_grad_where_empty(weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Returns `weight`; kernels may leave the gradient of an empty group unset."""
    del group_sizes
    return weight


def _zero_grad_backward(group_sizes: jax.Array, dw_IFH: jax.Array) -> Any:
    is_filled_I11 = (group_sizes > 0)[:, None, None]
    return jnp.where(is_filled_I11, dw_IFH, jnp.zeros((), dw_IFH.dtype)), None


_zero_grad_where_empty.defvjp(
    lambda weight, sizes: (weight, sizes), _zero_grad_backward
)


def mask_rows(value_M: jax.Array, num_rows: jax.Array) -> jax.Array:
    """Returns the values with zeros in all rows from `num_rows` on."""
    row_M1 = jnp.arange(value_M.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(row_M1 < num_rows, value_M, jnp.zeros((), value_M.dtype))


def _check(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    implementation: Implementation,
) -> None:
    check_choices(implementation=(implementation, Implementation))
    if implementation == "tokamax" and not has_tokamax():
        raise ValueError(
            f"{implementation=} is not installed; pip install tokamax, or use 'auto'."
        )
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x of shape {x.shape} and weight of shape {weight.shape} do not match; "
            "they must be [rows, d] and [groups, d, f]."
        )
    if group_sizes.shape != weight.shape[:1]:
        raise ValueError(
            f"group_sizes has shape {group_sizes.shape}, but weight has "
            f"{weight.shape[0]} groups; pass one size per group."
        )
    if x.dtype != weight.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x is {x.dtype} and weight is {weight.dtype}; both must have one floating "
            "dtype."
        )
