"""Float8 products, and the kernel in the interpreter, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import Scaled, quantize_blocks, quantize_tiles
from eplb_jax.products import dequantize, scaled_weight_grad
from eplb_jax.products.scaled_products import scaled_grouped_matmul, scaled_matmul

WAYS = ["dequantized", "interpreted"]
SIZES = [
    [5, 0, 140, 3],
    [0, 0, 0, 0],
    [300, 0, 0, 0],
    [0, 128, 0, 129],
    [128, 127, 44, 1],
]
ROWS, IN, OUT = 300, 200, 130


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(x):
    return np.asarray(dequantize(x), np.float64)


@functools.lru_cache
def operands():
    """Rows, weights and cotangents, with tiles of huge and of tiny numbers."""
    x, w, dy = normal(0, ROWS, IN), normal(1, 4, IN, OUT), normal(2, ROWS, OUT)
    x[130:140] *= 1e20
    x[200:210] *= 1e-25
    w[2] *= 1e-3
    w[3, :128] = 0
    return tuple(map(jnp.asarray, (x, w, dy)))


def close(got, want):
    got = np.asarray(got, np.float64)
    # Sums of float32 in another order; each row has a size of its own.
    largest = np.abs(want).max(axis=-1, keepdims=True)
    assert (np.abs(got - want) <= 1e-5 * largest).all()


@pytest.mark.parametrize("way", WAYS)
def test_grouped_products_of_any_sizes(way):
    x, w, dy = operands()
    forward = quantize_tiles(x), quantize_blocks(w)
    backward = quantize_tiles(x, axis=-2), quantize_tiles(dy, axis=-2)

    @jax.jit
    def run(sizes):
        y = scaled_grouped_matmul(
            *forward, sizes, out_dtype=jnp.float32, implementation=way
        )
        return y, scaled_weight_grad(*backward, sizes, implementation=way)

    rows, weights = map(exact, forward)
    columns, grads = map(exact, backward)
    for sizes in SIZES:
        want_y, want_dw = np.zeros((ROWS, OUT)), np.zeros(w.shape)
        start = 0
        for group, size in enumerate(sizes):
            of = slice(start, start + size)
            want_y[of] = rows[of] @ weights[group]
            want_dw[group] = columns[of].T @ grads[of]
            start += size
        y, dw = run(jnp.array(sizes))
        close(y, want_y)
        # The largest of a group: huge rows are in one or two of them.
        for ours, theirs in zip(dw, want_dw, strict=True):
            close(ours.ravel(), theirs.ravel())


@pytest.mark.parametrize("way", WAYS)
def test_dense_products(way):
    x, w, dy = operands()
    x, w = x.reshape(2, 150, IN), w[0]
    scaled = quantize_tiles(x), quantize_blocks(w)
    y = scaled_matmul(*scaled, implementation=way)
    want = exact(scaled[0]) @ exact(scaled[1])
    assert y.dtype == jnp.bfloat16 and y.shape == want.shape
    # One rounding to eight bits.
    assert (np.abs(np.float64(y) - want) <= np.abs(want) * 2**-8 + 1e-4).all()
    grad = quantize_tiles(dy.reshape(2, 150, OUT))
    dx = scaled_matmul(
        grad, scaled[1].transposed, out_dtype=jnp.float32, implementation=way
    )
    close(dx, exact(grad) @ exact(scaled[1]).T)
    flat = quantize_tiles(x.reshape(ROWS, IN), axis=-2), quantize_tiles(dy, axis=-2)
    dw = scaled_weight_grad(*flat, implementation=way)
    close(dw.ravel(), (exact(flat[0]).T @ exact(flat[1])).ravel())


@pytest.mark.parametrize("way", WAYS)
def test_nan_comes_out_only_where_it_came_in(way):
    x, w, dy = operands()
    sizes = jnp.array([100, 57, 0, 60])
    bad_row, padding = 120, 217
    x = x.at[bad_row, 3].set(jnp.nan).at[padding:].set(jnp.inf)
    y = scaled_grouped_matmul(
        quantize_tiles(x), quantize_blocks(w), sizes, implementation=way
    )
    assert np.isnan(y[bad_row]).all()
    assert np.isfinite(np.delete(np.float32(y), bad_row, axis=0)).all()
    assert (y[padding:] == 0).all()
    columns = quantize_tiles(x, axis=-2), quantize_tiles(dy, axis=-2)
    dw = np.array(scaled_weight_grad(*columns, sizes, implementation=way))
    # Rows 100 to 156 are group 1's; feature 3 of row 120 is one of its sums.
    assert np.isnan(dw[1, 3]).all()
    dw[1, 3] = 0
    assert np.isfinite(dw).all() and (dw[2] == 0).all()


def test_nothing_to_multiply():
    x, w = quantize_tiles(jnp.ones((0, 130))), quantize_blocks(jnp.ones((2, 130, 4)))
    sizes = jnp.zeros(2, jnp.int32)
    assert scaled_grouped_matmul(x, w, sizes).shape == (0, 4)
    assert scaled_matmul(x, Scaled(*(leaf[0] for leaf in w))).shape == (0, 4)
    columns = quantize_tiles(jnp.ones((0, 3)), axis=-2)
    assert scaled_weight_grad(columns, columns, sizes).tolist() == [[[0.0] * 3] * 3] * 2


def test_inside_shard_map_with_its_checks():
    """The kernel, which is not compiled here, has the types that the checks need."""
    mesh = jax.make_mesh(
        (2,),
        ("a",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:2],
    )
    x, w, _ = operands()

    def run(x, w):
        sizes = jnp.full(4, 30, jnp.int32)
        return scaled_grouped_matmul(quantize_tiles(x), quantize_blocks(w), sizes)

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(jax.P("a"), jax.P()), out_specs=jax.P("a")
    )
    got = jax.jit(mapped)(x, w)
    for half in (slice(0, 150), slice(150, 300)):
        np.testing.assert_array_equal(got[half], run(x[half], w))


def test_refusals():
    x, w = quantize_tiles(jnp.ones((4, 256))), quantize_blocks(jnp.ones((256, 130)))
    groups = Scaled(*(leaf[None] for leaf in w))
    with pytest.raises(ValueError, match=r"x is .*Array.*, not a Scaled; quantize it"):
        scaled_matmul(jnp.ones((4, 256)), w)
    with pytest.raises(
        ValueError, match=r"w has scales of shape \(256, 2\) .* must be \(2, 2\)"
    ):
        scaled_matmul(x, quantize_tiles(jnp.ones((256, 130))))
    with pytest.raises(ValueError, match=r"values of float32 and scales of float32"):
        scaled_matmul(Scaled(jnp.ones((4, 256)), x.scales), w)
    with pytest.raises(ValueError, match=r"x of shape \(4, 256\) and w of shape \(130"):
        scaled_matmul(x, w.transposed)
    with pytest.raises(ValueError, match=r"out_dtype=.*float16.* bfloat16 or float32"):
        scaled_matmul(x, w, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"implementation='cuda' must be one of auto"):
        scaled_matmul(x, w, implementation="cuda")
    with pytest.raises(ValueError, match=r"must be \[rows, K\] and \[groups, K, N\]"):
        scaled_grouped_matmul(x, w, jnp.array([4]))
    with pytest.raises(
        ValueError, match=r"group_sizes has shape \(2,\), but there are"
    ):
        scaled_grouped_matmul(x, groups, jnp.array([2, 2]))
    with pytest.raises(ValueError, match=r"group_sizes is float32; it must be int32"):
        scaled_grouped_matmul(x, groups, jnp.array([4.0]))
    with pytest.raises(ValueError, match=r"\[rows, n\] with scales for 128 x 1 values"):
        scaled_weight_grad(x, x)
