"""Quantization against NumPy: errors, scales, and numbers that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import Scaled, quantize_blocks, quantize_tiles
from eplb_jax.products import dequantize

LARGEST = 448.0


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tile_of(scales, shape, tiles):
    """The scale of each value, by the definition."""
    index = np.indices(shape)
    return np.asarray(scales)[
        tuple(i // tile for i, tile in zip(index, tiles, strict=True))
    ]


KINDS = {
    "tiles": (quantize_tiles, (1, 128)),
    "columns": (lambda x: quantize_tiles(x, axis=-2), (128, 1)),
    "blocks": (quantize_blocks, (128, 128)),
}


@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (130, 257), (128, 384)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_errors(kind, shape):
    quantize, tiles = KINDS[kind]
    # Rows and columns of very different sizes.
    rows, columns = 10.0 ** normal(1, shape[0]), 10.0 ** normal(2, shape[1])
    x = normal(0, *shape) * rows[:, None] * columns
    found = quantize(jnp.asarray(x))
    assert found.values.dtype == jnp.float8_e4m3fn
    assert found.values.shape == shape and found.scales.dtype == jnp.float32
    want = tuple(-(-size // tile) for size, tile in zip(shape, tiles, strict=True))
    assert found.scales.shape == want
    scale = tile_of(found.scales, shape, tiles)
    for at in np.ndindex(*want):
        pairs = zip(at, tiles, strict=True)
        tile = np.abs(x[tuple(slice(i * t, (i + 1) * t) for i, t in pairs)])
        np.testing.assert_allclose(found.scales[at], tile.max() / LARGEST, rtol=1e-6)
    values = np.asarray(found.values, np.float64)
    # Three bits after the leading one; below 2**-6 a fixed step of 2**-9.
    error = np.abs(values - np.float64(x) / scale)
    assert (error <= np.maximum(np.abs(values) * 2**-4, 2**-10) * (1 + 1e-5)).all()
    np.testing.assert_array_equal(dequantize(found), np.float32(values) * scale)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 3e38])
def test_the_smallest_and_the_largest(size):
    found = quantize_tiles(jnp.full((2, 130), size, jnp.float32))
    assert np.isfinite(np.asarray(found.values, np.float32)).all()
    assert (np.asarray(found.scales) > 0).all()
    # Numbers below float32's normal ones have few bits, or count as zero.
    tolerance = 1e-6 if size > 1e-37 else 1.0
    np.testing.assert_allclose(dequantize(found), size, rtol=tolerance)
    if size == 0:
        assert (np.asarray(found.scales) == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_where_it_is(kind):
    quantize, _ = KINDS[kind]
    x = normal(0, 130, 140)
    want = np.asarray(dequantize(quantize(jnp.asarray(x))))
    x[3, 5], x[100, 7], x[129, 139] = np.nan, np.inf, -np.inf
    x[0, 0] = x[129, 0] = x[0, 139] = x[129, 138] = 4  # the scales stay the same
    got = np.asarray(dequantize(jax.jit(quantize)(jnp.asarray(x))))
    assert (np.isnan(got) == ~np.isfinite(x)).all()
    alone = quantize(jnp.asarray(np.where(np.isfinite(x), x, 0)))
    is_finite = np.isfinite(x)
    np.testing.assert_array_equal(
        got[is_finite], np.asarray(dequantize(alone))[is_finite]
    )
    assert want.shape == got.shape


def test_powers_of_two():
    x = jnp.asarray(normal(0, 256, 256) * 10.0 ** normal(1, 256, 1))
    found = quantize_tiles(x, powers_of_two=True)
    mantissa, _ = np.frexp(np.asarray(found.scales))
    assert (mantissa == 0.5).all()
    plain = quantize_tiles(x).scales
    assert (found.scales >= plain).all() and (found.scales < 2 * plain).all()
    # So the other tiles of the result lose only what is too small for them.
    again = quantize_tiles(dequantize(found), axis=-2, powers_of_two=True)
    before, after = np.asarray(dequantize(found)), np.asarray(dequantize(again))
    step = tile_of(again.scales, x.shape, (128, 1)) * 2**-9
    is_normal = np.abs(before) >= step * 2**3
    np.testing.assert_array_equal(after[is_normal], before[is_normal])
    assert (np.abs(after - before) <= step / 2).all()


def test_a_transposed_weight_has_the_same_values():
    w = jnp.asarray(normal(0, 200, 130))
    for ours, theirs in zip(
        quantize_blocks(w).transposed, quantize_blocks(w.T), strict=True
    ):
        np.testing.assert_array_equal(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        )


def test_under_vmap():
    x = jnp.asarray(normal(0, 3, 5, 130))
    for kind, (quantize, _) in KINDS.items():
        mapped = jax.vmap(quantize)(x)
        for i in range(3):
            one = quantize(x[i])
            for ours, theirs in zip(mapped, one, strict=True):
                np.testing.assert_array_equal(
                    np.asarray(ours[i], np.float32),
                    np.asarray(theirs, np.float32),
                    err_msg=kind,
                )


def test_refusals():
    with pytest.raises(ValueError, match=r"axis=0 must be -1 or -2"):
        quantize_tiles(jnp.ones((2, 2)), axis=0)
    with pytest.raises(ValueError, match=r"x is int32\[2\]; it must be floating point"):
        quantize_tiles(jnp.arange(2, dtype=jnp.int32))
    with pytest.raises(ValueError, match=r"w is float32\[3\]; .* at least 2 axes"):
        quantize_blocks(jnp.ones(3))
    assert isinstance(quantize_blocks(jnp.ones((3, 3))), Scaled)
