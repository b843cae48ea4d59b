"""The executor against the same model without a pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from dualpipe_jax import dualpipe
from dualpipe_jax.executor.pipeline import (
    PipelineParams,
    pipeline_forward,
    pipeline_value_and_grad,
)
from tests.executor.toy import (
    SCHEDULES,
    SEVERAL_STAGES,
    assert_grads_close,
    embed_fn,
    loss_fn,
    make_batch,
    make_mesh,
    make_params,
    stage_fn,
)
from tests.reference import reference_forward, reference_value_and_grad

pytestmark = pytest.mark.as_users  # numbers are compared to the last bit


ALL = SCHEDULES | SEVERAL_STAGES


def arguments(schedule):
    return make_params(schedule.num_stages), *make_batch(schedule.num_microbatches)


def run(builder, name, **options):
    schedule = ALL[name]
    step = builder(stage_fn, loss_fn, schedule=schedule, embed_fn=embed_fn, **options)
    return jax.jit(step)(*arguments(schedule))


@functools.cache
def pipelined(name, overlap=None):
    mesh = make_mesh(pp=ALL[name].num_ranks)
    return run(pipeline_value_and_grad, name, mesh=mesh, overlap=overlap)


@functools.cache
def unpipelined(name):
    return run(reference_value_and_grad, name)


# Some are in the quick tier.
@pytest.mark.parametrize(
    ("name", "overlap"),
    [
        pytest.param(
            name,
            overlap,
            id=f"{name}, overlap" if overlap else name,
            marks=[] if name == "dualpipev" else [pytest.mark.slow],
        )
        for name in ALL
        for overlap in ((None, True) if name in SCHEDULES else (None,))
    ],
)
def test_matches_unpipelined(name, overlap):
    (losses, aux), grads = pipelined(name, overlap)
    (expected_losses, _), expected_grads = unpipelined(name)
    assert aux is None
    # Two units in the last place: XLA fuses the two programs differently.
    np.testing.assert_array_max_ulp(np.asarray(losses), expected_losses, 2)
    assert_grads_close(grads, expected_grads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overlap"), [*((name, None) for name in ALL), ("dualpipe", True)]
)
def test_forward_matches_unpipelined(name, overlap):
    schedule = ALL[name]
    params = make_params(schedule.num_stages)
    tokens, _ = make_batch(schedule.num_microbatches)
    mesh = make_mesh(pp=schedule.num_ranks, dp=2)
    outputs = pipeline_forward(
        stage_fn,
        schedule=schedule,
        mesh=mesh,
        embed_fn=embed_fn,
        data_axes=("dp",),
        overlap=overlap,
    )(params, tokens)
    expected = reference_forward(stage_fn, schedule=schedule, embed_fn=embed_fn)
    # f32 matrix products of half as many rows.
    np.testing.assert_allclose(outputs, expected(params, tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_upstream_example():
    """DeepSeek's own example, deepseek-ai/DualPipe@3da1bbe examples/.

    A stage is linear, gelu, linear; 8 ranks, 20 microbatches of [3, 256, 512] (here
    [3, 16, 512], which takes a sixteenth of the time), mean squared error. Upstream
    requires equal losses and a gradient difference of 1e-13.
    """
    num_ranks, num_microbatches, width = 8, 20, 512
    schedule = dualpipe(num_ranks, num_microbatches)

    def stage(params, x):
        return jax.nn.gelu(x @ params["up"], approximate=False) @ params["down"]

    def mse(_, y, targets):
        return jnp.mean(jnp.square(y - targets))

    rng = np.random.default_rng(0)

    def linear(n, m):
        # torch's initialization: uniform within 1 / sqrt(inputs).
        shape = (num_ranks, n, m)
        return jnp.asarray(rng.uniform(-1, 1, shape) / np.sqrt(n), jnp.float32)

    params = PipelineParams(
        {"up": linear(width, 4 * width), "down": linear(4 * width, width)}
    )
    inputs, targets = jnp.asarray(
        rng.standard_normal((2, num_microbatches, 3, 16, width)), jnp.float32
    )
    step = pipeline_value_and_grad(
        stage, mse, schedule=schedule, mesh=make_mesh(pp=num_ranks)
    )
    (losses, _), grads = step(params, inputs, targets)

    @jax.jit
    def one(stages, x, t):
        def loss(stages):
            y = x
            for s in range(num_ranks):
                y = stage(jax.tree.map(lambda a: a[s], stages), y)  # noqa: B023
            loss = mse(None, y, t)
            return loss / num_microbatches, loss

        grads, loss = jax.grad(loss, has_aux=True)(stages)
        return loss, grads

    expected_losses, sums = (
        [],
        jax.tree.map(lambda a: np.zeros(a.shape, np.float64), params.stages),
    )
    for x, t in zip(inputs, targets, strict=True):
        loss, grad = one(params.stages, x, t)
        expected_losses.append(loss)
        sums = jax.tree.map(lambda s, g: s + np.asarray(g, np.float64), sums, grad)
    np.testing.assert_array_equal(losses, np.stack(expected_losses))

    def difference(x, y):
        x = np.asarray(x, np.float64)
        return 1 - 2 * np.vdot(x, y) / (np.vdot(x, x) + np.vdot(y, y))

    for leaf in jax.tree.leaves(jax.tree.map(difference, grads.stages, sums)):
        assert leaf < 1e-13


@pytest.mark.slow
def test_data_and_expert_axes():
    """Besides pp: a batch split over two axes, and weights sharded over one of them.

    The stage gathers its sharded weight with a collective inside a branch that only
    some pipeline ranks take.
    """
    schedule = dualpipe(2, 6)
    mesh = make_mesh(pp=2, dp=2, ep=2)
    params = make_params(schedule.num_stages)
    batch = make_batch(schedule.num_microbatches)

    def sharded_stage(params, x):
        up = lax.all_gather(params["up"], "ep", axis=1, tiled=True)
        return stage_fn({**params, "up": up}, x)

    specs = PipelineParams({"up": P(None, "ep"), "down": P()}, P(), P())
    step = pipeline_value_and_grad(
        sharded_stage,
        loss_fn,
        schedule=schedule,
        mesh=mesh,
        embed_fn=embed_fn,
        data_axes=("dp", "ep"),
        param_specs=specs,
    )
    (losses, _), grads = step(params, *batch)
    reference = reference_value_and_grad(
        stage_fn, loss_fn, schedule=schedule, embed_fn=embed_fn
    )
    (expected_losses, _), expected = jax.jit(reference)(params, *batch)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)  # f32 means of means
    assert_grads_close(grads, expected)
    assert grads.stages["up"].sharding.spec == P("pp", None, "ep")


@pytest.mark.slow
def test_unused_axis_changes_nothing():
    beside = run(pipeline_value_and_grad, "zb1p", mesh=make_mesh(tp=2, pp=4))
    jax.tree.map(np.testing.assert_array_equal, beside, pipelined("zb1p"))


@pytest.mark.slow
def test_explicit_mesh_and_sharded_params():
    """`jax.make_mesh`'s default axis types, parameters sharded as in training."""
    schedule = SCHEDULES["one_f_one_b"]
    mesh = jax.make_mesh((4,), ("pp",), devices=jax.devices()[:4])
    params, *batch = arguments(schedule)
    step = pipeline_value_and_grad(
        stage_fn, loss_fn, schedule=schedule, mesh=mesh, embed_fn=embed_fn
    )
    stages = jax.device_put(params.stages, NamedSharding(mesh, P("pp")))
    placed = PipelineParams(stages, params.embed, params.head)
    (losses, _), grads = step(placed, *batch)
    assert grads.stages["up"].sharding.is_equivalent_to(NamedSharding(mesh, P("pp")), 3)
    (expected, _), _ = unpipelined("one_f_one_b")
    np.testing.assert_array_max_ulp(np.asarray(losses), expected, 2)
