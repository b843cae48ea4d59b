"""A server with weights in float8: published ones as they are, and its first tokens."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from dualpipe_jax.deepseek import DeepSeekConfig
from dualpipe_jax.deepseek.pretrained.safetensors import File
from dualpipe_jax.deepseek.serve import ServeConfig, make_serve_programs
from dualpipe_jax.deepseek.serve.weights import load_published
from dualpipe_jax.gpu import gpu_mesh
from dualpipe_jax.train import make_programs
from tests.deepseek.model import small
from tests.deepseek.serve import small_server

PUBLISHED = Path(__file__).parents[2] / "data" / "deepseek_v3_fp8"


def tensors():
    """All tensors of the published model, by name."""
    found = {}
    for path in sorted(PUBLISHED.glob("*.safetensors")):
        file = File(path)
        for name, info in file.tensors.items():
            columns = slice(0, info.shape[-1])
            found[name] = file.read(name, slice(0, info.shape[0]), columns)
    return found


def test_published_float8_weights_are_held_as_they_are():
    config = ServeConfig(
        name="published",
        architecture=DeepSeekConfig.from_pretrained(PUBLISHED),
        num_devices=1,
        requests_per_device=2,
        context_length=16,
        products="fp8",
    )
    params = load_published(config, PUBLISHED)
    raw = tensors()

    def check(weight, name):
        # Published weights are transposed, too.
        scaled = weight.transposed
        values = np.asarray(scaled.values).view(np.uint8)
        np.testing.assert_array_equal(values, raw[name].view(np.uint8), name)
        # A scale is the largest number over 448, once more.
        scales = raw[f"{name}_scale_inv"]
        np.testing.assert_allclose(scaled.scales, scales, rtol=3e-7, err_msg=name)

    first, second = params.layers
    prefix = "model.layers.1."
    check(second["attention"]["q_up"]["kernel"], f"{prefix}self_attn.q_b_proj.weight")
    check(second["attention"]["out"]["kernel"], f"{prefix}self_attn.o_proj.weight")
    check(first["dense"]["down"]["kernel"], "model.layers.0.mlp.down_proj.weight")
    gate = params.experts[0].gate
    for expert in range(config.architecture.n_routed_experts):
        own = jax.tree.map(lambda leaf, at=expert: leaf[at], gate)
        check(own, f"{prefix}mlp.experts.{expert}.gate_proj.weight")


def test_gpus_without_float8_are_refused():
    message = "capability 8.9 or more, but NVIDIA A100 80GB has 8.0; use products="
    config = small_server.config(products="fp8", num_devices=1, num_redundant=0)
    with pytest.raises(ValueError, match=message):
        make_serve_programs(config, gpu_mesh("a100", config.mesh_shape))
    training = small.config(model={"products": "fp8"})
    with pytest.raises(ValueError, match=message):
        make_programs(training, gpu_mesh("a100", training.mesh_shape))


@pytest.mark.slow  # programs of a server
def test_first_tokens_are_those_of_the_model():
    config = small_server.config(
        architecture=dataclasses.replace(small_server.SIZES, num_hidden_layers=2),
        num_devices=1,
        num_redundant=0,
        rebalance=None,
        products="fp8",
        requests_per_device=8,
        context_length=12,
        prompts_per_device=8,
        max_prefill_tokens=60,
    )
    _, bias = small_server.params(config)
    engine = small_server.engine(config)
    prompts = small_server.prompts(8, config)
    tokens = engine.generate(prompts, max_tokens=2)
    complete = small_server.reference(config, bias)
    for prompt, got in zip(prompts, tokens, strict=True):
        # The second token is of a step that absorbs matrices, which rounds otherwise.
        assert len(got) == 2 and got[0] == complete(prompt, 1)[0]
