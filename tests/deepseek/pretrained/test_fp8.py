"""Published float8 weights are quantized as those that products read."""

import jax.numpy as jnp
import numpy as np

from dualpipe_jax.deepseek.pretrained.fp8 import dequantize, quantize
from eplb_jax import Scaled, quantize_blocks
from eplb_jax.products import dequantize as dequantize_scaled


def test_files_and_products_are_quantized_alike():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((200, 130)).astype(np.float32)
    weights *= 10.0 ** rng.integers(-3, 3, (200, 1)).astype(np.float32)
    weights[128:, 128:] = 0
    values, scales = quantize(weights, (128, 128))
    found = quantize_blocks(jnp.asarray(weights))
    np.testing.assert_array_equal(values.view(np.uint8), found.values.view(np.uint8))
    # XLA divides by a constant as a product with its inverse.
    np.testing.assert_allclose(scales, found.scales, rtol=2e-7)
    whole = dequantize(values, scales, (128, 128))
    again = dequantize_scaled(Scaled(jnp.asarray(values), jnp.asarray(scales)))
    np.testing.assert_array_equal(whole, again)
