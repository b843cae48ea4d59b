"""Flax modules with state, in all of the pipeline's functions."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dualpipe_jax import PipelineParams, one_f_one_b, stack_stages
from dualpipe_jax.executor.pipeline import pipeline_forward, pipeline_value_and_grad
from tests.executor.toy import assert_grads_close, make_mesh

WIDTH, BATCH, MICROBATCHES = 3, 5, 4


class Normed(nnx.Module):
    """Changes its running statistics when called."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.linear = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        # Not linear: a following norm would hide the scale and the bias of this one.
        return jnp.tanh(self.norm(self.linear(x), use_running_average=False))


GRAPHDEF = nnx.graphdef(Normed(0))
EMBED, FIRST, SECOND, HEAD = (nnx.state(Normed(seed)) for seed in range(4))
PARAMS = PipelineParams(stack_stages([FIRST, SECOND]), EMBED, HEAD)
BATCHES = jax.random.normal(jax.random.key(0), (2, MICROBATCHES, BATCH, WIDTH))


def apply(params, x):
    return nnx.merge(GRAPHDEF, params)(x)


def stage(params, x):
    module = nnx.merge(GRAPHDEF, params)
    return module(x), nnx.state(module, nnx.BatchStat)


def loss(params, y, target):
    module = nnx.merge(GRAPHDEF, params)
    total = jnp.mean((module(y) - target) ** 2)
    return total, nnx.state(module, nnx.BatchStat)


LAYOUT = {
    "embed_fn": apply,
    "schedule": one_f_one_b(2, MICROBATCHES),
    "mesh": make_mesh(pp=2),
}


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_batch_norm_everywhere(overlap):
    step = pipeline_value_and_grad(
        stage, loss, aux_reduction="mean", overlap=overlap, **LAYOUT
    )
    (losses, aux), grads = step(PARAMS, *BATCHES)

    def one(params, x, target):
        x, stats = apply(params.embed, x), []
        for number in range(2):
            x, new = stage(jax.tree.map(lambda a: a[number], params.stages), x)  # noqa: B023
            stats.append(new)
        total, last = loss(params.head, x, target)
        return total, (stack_stages(stats), last)

    def mean(params):
        losses, stats = jax.vmap(one, (None, 0, 0))(params, *BATCHES)
        return losses.mean(), (losses, jax.tree.map(lambda a: a.mean(0), stats))

    (_, (expected_losses, stats)), expected = jax.value_and_grad(mean, has_aux=True)(
        PARAMS
    )
    assert_grads_close(losses, expected_losses)
    assert_grads_close((aux.stages, aux.loss), stats)
    # f32: variances of five rows, four times in a row.
    assert_grads_close(grads, expected, rtol=1e-4)


def test_batch_norm_in_a_forward_pass():
    outputs = pipeline_forward(stage, **LAYOUT)(PARAMS, BATCHES[0])

    def one(params, x):
        x = apply(params.embed, x)
        for number in range(2):
            x, _ = stage(jax.tree.map(lambda a: a[number], params.stages), x)  # noqa: B023
        return x

    assert_grads_close(outputs, jax.vmap(one, (None, 0))(PARAMS, BATCHES[0]))


@pytest.mark.parametrize("part", ["stages", "embed", "head"])
def test_random_state_is_refused(part):
    dropout = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    dropout = stack_stages([dropout] * 2) if part == "stages" else dropout
    params = PipelineParams(**{**vars(PARAMS), part: dropout})
    step = pipeline_value_and_grad(stage, loss, **LAYOUT)
    message = rf"params\.{part}.*\bkey<.* array; keep random state out of the param"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, params, *BATCHES)


@pytest.mark.parametrize("part", ["stage", "loss"])
def test_keys_are_refused_as_aux(part):
    functions = {"stage": lambda p, x: x, "loss": lambda p, y, t: jnp.mean(y)}
    inner = functions[part]
    functions[part] = lambda *args: (inner(*args), {"key": jax.random.key(0)})
    step = pipeline_value_and_grad(functions["stage"], functions["loss"], **LAYOUT)
    message = rf"{part}_fn returns a key<.* array as aux\['key'\], which cannot be summ"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, PARAMS, *BATCHES)


def test_floats_with_their_own_sum_are_not_called_random():
    from flax.linen.fp8_ops import fm32

    params = PipelineParams(PARAMS.stages, EMBED, {"scale": jnp.ones(1).astype(fm32)})
    step = pipeline_value_and_grad(stage, loss, **LAYOUT)
    with pytest.raises(ValueError, match=r"params\.head.*gradients do not add up.*flo"):
        jax.eval_shape(step, params, *BATCHES)
