"""Training with products in float8: the pipelined step, and what it keeps."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from dualpipe_jax.configs import profiles
from dualpipe_jax.gpu import gpu_mesh
from dualpipe_jax.train import make_programs
from tests.deepseek.model import small
from tests.deepseek.model.test_training import pipelined_steps

# Compiles a train step; traces two of DeepSeek-V3's sizes.
pytestmark = pytest.mark.slow


def test_a_step_is_that_of_one_device():
    # I and W apart: what waits for W is in float8.
    config = small.config(
        schedule="zb1p",
        architecture={"num_hidden_layers": 2},
        model={"products": "fp8", "eplb": None},
    )
    (pipelined,), _ = pipelined_steps(config, 1)
    (one,) = small.unpipelined_steps(config, 1)
    # The forward is the same, whichever device has a token; gradients of weights are
    # sums over other tiles of rows.
    np.testing.assert_allclose(pipelined["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(pipelined["grad_norm"], one["grad_norm"], rtol=1e-2)


def kept(**changes):
    """Bytes of a slot that F keeps, and that I keeps for W, one layer per chunk."""
    config = profiles.training()
    sizes = dataclasses.replace(config.model.architecture, num_hidden_layers=4)
    model = dataclasses.replace(
        config.model, architecture=sizes, layer_costs=(1.0,) * 4, **changes
    )
    config = dataclasses.replace(config, model=model)
    found = make_programs(config, gpu_mesh("h800", config.mesh_shape)).buffers()
    return (
        found.residuals / found.num_slots,
        found.wgrad_residuals / found.num_wgrad_residual_slots,
    )


def test_what_is_kept_and_what_waits_for_w_is_float8():
    with jax.numpy_dtype_promotion("standard"):  # flax's norms take float32 means
        before = kept(products="plain", payload="plain")
        after = kept(products="fp8", payload="fp8")
    ratios = np.divide(after, before)
    # Half of it, but the residual stream and the router's input. Without flash
    # attention, W computes the attention's output again, from bfloat16.
    has_flash = importlib.util.find_spec("tokamax") is not None
    assert ratios[0] < 0.6
    assert ratios[1] < (0.6 if has_flash else 0.7)
