"""A linear layer in float8: each of its three products is of the right operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import quantize_blocks, quantize_tiles
from eplb_jax.products import (
    ScaledWeight,
    dequantize,
    scale_rows,
    scaled_linear,
    scaled_swiglu,
    swiglu,
    unscale_rows,
)

ROWS, IN, OUT, GROUPS = 150, 200, 130, 3
SIZES = [70, 0, 60]


def normal(seed, *shape):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def exact(x):
    return np.asarray(dequantize(x), np.float64)


def rows_of_groups(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def value_and_pullback(function, ct, *args):
    """Returns the function's value, and the cotangents of its arguments."""

    @jax.jit
    def run(ct, *args):
        value, pullback = jax.vjp(function, *args)
        return value, pullback(ct)

    return run(ct, *args)


def check(got, want):
    # Sums of at most 200 products in float32.
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_dense(powers_of_two):
    x, w, dy = normal(0, 2, 75, IN), normal(1, IN, OUT), normal(2, 2, 75, OUT)

    def run(x, w):
        return scaled_linear(scale_rows(x, powers_of_two=powers_of_two), w)

    y, (dx, dw) = value_and_pullback(run, dy, x, w)
    tiles, blocks = quantize_tiles(x, powers_of_two=powers_of_two), quantize_blocks(w)
    check(y, exact(tiles) @ exact(blocks))
    check(dx, exact(quantize_tiles(dy)) @ exact(blocks).T)
    kept = dequantize(tiles).reshape(ROWS, IN)
    columns = quantize_tiles(kept, axis=-2, powers_of_two=powers_of_two)
    grads = quantize_tiles(dy.reshape(ROWS, OUT), axis=-2)
    check(dw, exact(columns).T @ exact(grads))
    if powers_of_two:
        # Only numbers that are tiny beside others of their column change.
        change = np.abs(exact(columns) - np.float64(kept))
        assert change.max() <= np.abs(kept).max() * 2**-16


def test_groups_with_anything_in_the_padding():
    x, w, dy = normal(0, ROWS, IN), normal(1, GROUPS, IN, OUT), normal(2, ROWS, OUT)
    padding = jnp.arange(ROWS)[:, None] >= sum(SIZES)
    x, dy = jnp.where(padding, jnp.nan, x), jnp.where(padding, jnp.inf, dy)
    sizes = jnp.array(SIZES)
    y, (dx, dw) = value_and_pullback(
        lambda x, w: scaled_linear(scale_rows(x), w, sizes), dy, x, w
    )
    tiles, blocks = exact(quantize_tiles(x)), exact(quantize_blocks(w))
    grads = exact(quantize_tiles(dy))
    zero = jnp.zeros(())
    kept = jnp.where(padding, zero, dequantize(quantize_tiles(x)))
    columns = exact(quantize_tiles(kept, axis=-2))
    column_grads = exact(quantize_tiles(jnp.where(padding, zero, dy), axis=-2))
    assert (y[sum(SIZES) :] == 0).all() and (dx[sum(SIZES) :] == 0).all()
    for group, rows in enumerate(rows_of_groups(SIZES)):
        if SIZES[group]:
            check(y[rows], tiles[rows] @ blocks[group])
            check(dx[rows], grads[rows] @ blocks[group].T)
        check(dw[group], columns[rows].T @ column_grads[rows])


@pytest.mark.parametrize("groups", [0, GROUPS])
def test_a_swiglu_is_computed_again_from_float8(groups):
    gate, up, dy = normal(0, ROWS, OUT), normal(1, ROWS, OUT), normal(2, ROWS, IN)
    sizes = jnp.array([ROWS - 90, 90, 0]) if groups else None
    down = normal(3, *([groups] if groups else []), OUT, IN)
    weights = jnp.abs(normal(4, ROWS, 1))
    args = gate, up, down, weights
    y, got = value_and_pullback(
        lambda *args: scaled_swiglu(*args, group_sizes=sizes), dy, *args
    )
    # The forward has the exact numbers.
    hidden = swiglu(gate, up, weights)
    want = scaled_linear(scale_rows(hidden), down, sizes)
    np.testing.assert_array_equal(y, want)
    # The backward has what was kept of them.
    kept = [dequantize(quantize_tiles(each)) for each in (gate, up)]

    def again(gate, up, down, weights):
        return scaled_linear(scale_rows(swiglu(gate, up, weights)), down, sizes)

    _, wanted = value_and_pullback(again, dy, *kept, down, weights)
    for name, ours, theirs in zip("gudw", got, wanted, strict=True):
        # `again` quantizes the hidden rows once more for the gradient of `down`.
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < (0.05 if name == "d" else 1e-5), name


def test_one_gradient_for_all_products_of_some_rows():
    x, w = normal(0, 5, IN), normal(1, 2, IN, OUT)

    def run(x):
        rows = scale_rows(x)
        return scaled_linear(rows, w[0]) + scaled_linear(rows, w[1])

    def apart(x):
        return scaled_linear(scale_rows(x), w[0]) + scaled_linear(scale_rows(x), w[1])

    for each in (run, apart):
        assert each(x).shape == (5, OUT)
    got, want = (jax.grad(lambda x, f=f: f(x).sum())(x) for f in (run, apart))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    # And none of the handles is more than zeros that nothing reads.
    one = jax.grad(lambda x: unscale_rows(scale_rows(x)).sum())(x)
    assert (one == 1).all() and (scale_rows(x).handle == 0).all()


def test_weights_that_are_quantized_already():
    x, w = normal(0, 5, IN), normal(1, IN, OUT)
    got = scaled_linear(scale_rows(x), ScaledWeight.of(w))
    np.testing.assert_array_equal(got, scaled_linear(scale_rows(x), w))
    dx = jax.grad(lambda x: scaled_linear(scale_rows(x), ScaledWeight.of(w)).sum())(x)
    want = jax.grad(lambda x: scaled_linear(scale_rows(x), w).sum())(x)
    np.testing.assert_array_equal(dx, want)
