"""Published models against what transformers computes with them."""

import jax
import numpy as np
import optax
import pytest

from dualpipe_jax import dualpipe, pipeline_value_and_grad
from dualpipe_jax.deepseek import (
    DeepSeek,
    DeepSeekConfig,
    EplbConfig,
    ServeConfig,
    load_pretrained,
)
from dualpipe_jax.deepseek.serve import Engine, load_published
from tests.deepseek.pretrained.folders import V2, V3, expected

pytestmark = pytest.mark.slow  # each compiles a model

NO_LOSSES = {"balance_loss": 0.0, "z_loss": 0.0}
AUTO = jax.sharding.AxisType.Auto


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices()[:4]
    return jax.make_mesh((2, 2), ("pp", "ep"), axis_types=(AUTO,) * 2, devices=devices)


def check_logits(got, folder):
    want = expected(folder)["logits"]
    # float32 sums in another order, through three layers: 1e-6 was measured.
    error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
    assert error < 1e-5


def test_logits_of_deepseek_v2_on_one_device():
    pretrained = load_pretrained(V2)
    check_logits(pretrained.logits(expected(V2)["input_ids"]), V2)


def test_logits_of_deepseek_v3_through_two_stages_with_divided_experts(mesh):
    pretrained = load_pretrained(V3, mesh=mesh)
    router = pretrained.params.stages[0]["moe"]["router"]
    experts = pretrained.params.stages[0]["moe"]["experts"]["up"]
    assert router.sharding.spec[0] == "pp"
    assert experts.sharding.spec[:2] == ("pp", "ep")
    ids = expected(V3)["input_ids"]
    # Five sequences fill no whole number of microbatches.
    logits = pretrained.logits(np.concatenate([ids, ids[::-1], ids[:1]]))
    assert logits.shape == (5, 40, 96)
    check_logits(logits[:2], V3)
    check_logits(logits[3:1:-1], V3)


def test_loss_and_gradient_by_dualpipe_with_redundant_experts(mesh):
    pretrained = load_pretrained(V3, mesh=mesh)
    schedule, whole = dualpipe(2, 4), pretrained.mesh
    options = DeepSeek(
        architecture=pretrained.config,
        eplb=EplbConfig(every=1, num_redundant=4),
        **NO_LOSSES,
    )
    model = options.build(schedule, whole, microbatch_size=2, sequence_length=39)
    step = pipeline_value_and_grad(
        model.stage_fns,
        model.loss,
        schedule=schedule,
        mesh=whole,
        embed_fn=model.embed,
        data_axes=("dp", "ep"),
        param_specs=model.prepared_specs,
        tied=model.tied,
    )

    @jax.jit
    def run(params, buffers, tokens):
        params = model.convert_params(params, pretrained.model)
        buffers = model.convert_buffers(buffers, pretrained.model)
        prepared = model.prepare_params(params, buffers)
        (losses, _), grads = step(prepared, tokens[..., :-1], tokens[..., 1:])
        return losses.mean(), model.unprepare_grads(grads, buffers)

    # The same two sequences in each of four microbatches.
    tokens = np.tile(expected(V3)["input_ids"].astype(np.int32), (4, 1, 1))
    loss, grads = run(pretrained.params, pretrained.buffers, tokens)
    want = expected(V3)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-5)
    # Of half a million sums over 78 tokens, in float32.
    np.testing.assert_allclose(optax.tree.norm(grads), want["grad_norm"], rtol=1e-4)


def test_greedy_tokens_by_the_server():
    config = ServeConfig(
        name="published",
        architecture=DeepSeekConfig.from_pretrained(V2),
        num_devices=1,
        requests_per_device=2,
        context_length=40,
        max_prompt_length=12,
    )
    engine, want = Engine(config, load_published(config, V2)), expected(V2)
    (got,) = engine.generate([want["greedy_prompt"]], max_tokens=24)
    np.testing.assert_array_equal(got, want["greedy_tokens"])
