"""The executor against the same model without a pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dualpipe_jax import dualpipe, dualpipev, gpipe, one_f_one_b, zb1p
from dualpipe_jax.pipeline import (
    PipelineParams,
    microbatch_key,
    pipeline_forward,
    pipeline_value_and_grad,
    stack_stages,
)
from tests.reference import reference_forward, reference_value_and_grad

SCHEDULES = {
    "dualpipe": dualpipe(4, 8),
    "dualpipev": dualpipev(2, 6),
    "one_f_one_b": one_f_one_b(4, 5),
    "zb1p": zb1p(4, 6),
    "gpipe": gpipe(4, 6),
}
WIDTH, VOCABULARY, MICROBATCH, LENGTH = 16, 11, 4, 6


def make_mesh(**axes):
    size = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:size],
    )


def stage_fn(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def embed_fn(params, tokens):
    return params[tokens]


def cross_entropy(logits, targets):
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_probs, targets[..., None], -1))


def loss_fn(params, y, targets):
    return cross_entropy(y @ params, targets)


def make_params(num_stages, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_stages + 2)

    def normal(key, *shape):
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.3, dtype)

    stages = [
        {"up": normal(key, WIDTH, 2 * WIDTH), "down": normal(key, 2 * WIDTH, WIDTH)}
        for key in keys[:num_stages]
    ]
    return PipelineParams(
        stack_stages(stages),
        normal(keys[-2], VOCABULARY, WIDTH),
        normal(keys[-1], WIDTH, VOCABULARY),
    )


def make_batch(num_microbatches, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_microbatches, MICROBATCH, LENGTH)
    tokens, targets = rng.integers(0, VOCABULARY, (2, *shape)).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(targets)


def assert_grads_close(actual, expected, rtol=1e-5):
    """Within `rtol` of each leaf's largest entry: f32 sums in another order."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            a, e, rtol=0, atol=rtol * np.abs(e).max()
        ),
        actual,
        expected,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_matches_unpipelined(name):
    schedule = SCHEDULES[name]
    build = functools.partial(
        pipeline_value_and_grad, mesh=make_mesh(pp=schedule.num_ranks)
    )
    params = make_params(schedule.num_stages)
    batch = make_batch(schedule.num_microbatches)
    results = [
        jax.jit(builder(stage_fn, loss_fn, schedule=schedule, embed_fn=embed_fn))(
            params, *batch
        )
        for builder in (build, reference_value_and_grad)
    ]
    ((losses, aux), grads), ((expected_losses, _), expected_grads) = results
    assert aux is None
    # Two units in the last place: XLA fuses the two programs differently.
    np.testing.assert_array_max_ulp(np.asarray(losses), expected_losses, 2)
    assert_grads_close(grads, expected_grads)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_matches_unpipelined(name):
    schedule = SCHEDULES[name]
    params = make_params(schedule.num_stages)
    tokens, _ = make_batch(schedule.num_microbatches)
    mesh = make_mesh(pp=schedule.num_ranks, dp=2)
    outputs = pipeline_forward(
        stage_fn,
        schedule=schedule,
        mesh=mesh,
        embed_fn=embed_fn,
        data_axes=("dp",),
    )(params, tokens)
    expected = reference_forward(stage_fn, schedule=schedule, embed_fn=embed_fn)
    # f32 matrix products of half as many rows.
    np.testing.assert_allclose(outputs, expected(params, tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_upstream_example():
    """DeepSeek's own example, deepseek-ai/DualPipe@3da1bbe examples/.

    A stage is linear, gelu, linear; 8 ranks, 20 microbatches of [3, 256, 512], mean
    squared error. Upstream asks for equal losses and a gradient difference of 1e-13.
    """
    num_ranks, num_microbatches, width = 8, 20, 512
    schedule = dualpipe(num_ranks, num_microbatches)

    def stage(params, x):
        return jax.nn.gelu(x @ params["up"], approximate=False) @ params["down"]

    def mse(_, y, targets):
        return jnp.mean(jnp.square(y - targets))

    rng = np.random.default_rng(0)

    def linear(n, m):
        # As torch initialises it: uniform within 1 / sqrt(inputs).
        shape = (num_ranks, n, m)
        return jnp.asarray(rng.uniform(-1, 1, shape) / np.sqrt(n), jnp.float32)

    params = PipelineParams(
        {"up": linear(width, 4 * width), "down": linear(4 * width, width)}
    )
    inputs, targets = jnp.asarray(
        rng.standard_normal((2, num_microbatches, 3, 256, width)), jnp.float32
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
    """Beside pp: a batch split over two axes, and weights sharded over one of them.

    The stage gathers its sharded weight with a collective, which stands in a branch
    that only some pipeline ranks take.
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
    schedule = SCHEDULES["zb1p"]
    params = make_params(schedule.num_stages)
    batch = make_batch(schedule.num_microbatches)
    results = [
        pipeline_value_and_grad(
            stage_fn, loss_fn, schedule=schedule, mesh=mesh, embed_fn=embed_fn
        )(params, *batch)
        for mesh in (make_mesh(pp=4), make_mesh(tp=2, pp=4))
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.slow
def test_explicit_mesh_and_sharded_params():
    """`jax.make_mesh`'s default axis types, parameters laid out as they stay."""
    schedule = SCHEDULES["one_f_one_b"]
    mesh = jax.make_mesh((4,), ("pp",), devices=jax.devices()[:4])
    params = make_params(schedule.num_stages)
    batch = make_batch(schedule.num_microbatches)
    step = pipeline_value_and_grad(
        stage_fn, loss_fn, schedule=schedule, mesh=mesh, embed_fn=embed_fn
    )
    stages = jax.device_put(params.stages, NamedSharding(mesh, P("pp")))
    placed = PipelineParams(stages, params.embed, params.head)
    (losses, _), grads = step(placed, *batch)
    assert grads.stages["up"].sharding.is_equivalent_to(NamedSharding(mesh, P("pp")), 3)
    reference = reference_value_and_grad(
        stage_fn, loss_fn, schedule=schedule, embed_fn=embed_fn
    )
    (expected, _), _ = jax.jit(reference)(params, *batch)
    np.testing.assert_array_max_ulp(np.asarray(losses), expected, 2)


def tree_stage(params, x):
    y = stage_fn(params, x["tokens"])
    summary = x["summary"] * 0.5 + y.mean(1)
    return {"tokens": y, "summary": summary}, {"norm": jnp.sum(y * y), "calls": 1}


def tree_embed(params, tokens):
    x = embed_fn(params, tokens)
    return {"tokens": x, "summary": x[:, 0]}


def tree_loss(params, y, targets):
    logits = (y["tokens"] + y["summary"][:, None]) @ params
    return cross_entropy(logits, targets), {"first": logits[0, 0, 0]}


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "mean", "stack"])
def test_trees_and_auxiliary_outputs(reduction):
    schedule = dualpipev(2, 4)
    params = make_params(schedule.num_stages)
    tokens, targets = make_batch(schedule.num_microbatches)
    step = pipeline_value_and_grad(
        tree_stage,
        tree_loss,
        schedule=schedule,
        mesh=make_mesh(pp=2),
        embed_fn=tree_embed,
        aux_reduction=reduction,
    )
    (losses, aux), grads = step(params, tokens, targets)

    def one(params, tokens, targets):
        x, auxes = tree_embed(params.embed, tokens), []
        for s in range(schedule.num_stages):
            x, aux = tree_stage(jax.tree.map(lambda a: a[s], params.stages), x)  # noqa: B023
            auxes.append({**aux, "calls": jnp.int32(1)})
        loss, aux = tree_loss(params.head, x, targets)
        return loss, (jax.tree.map(lambda *a: jnp.stack(a), *auxes), aux)

    def mean(params):
        losses, aux = jax.vmap(one, (None, 0, 0))(params, tokens, targets)
        return losses.mean(), (losses, aux)

    (_, (expected_losses, expected_aux)), expected = jax.value_and_grad(
        mean, has_aux=True
    )(params)
    reduce = {
        "sum": lambda a: a.sum(0),
        "mean": lambda a: a.mean(0),
        "stack": lambda a: a,
    }[reduction]
    stages, loss = jax.tree.map(reduce, expected_aux)
    if reduction == "stack":
        stages = jax.tree.map(lambda a: a.swapaxes(0, 1), stages)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)  # f32 sums
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),  # f32 sums
        (aux.stages, aux.loss),
        (stages, loss),
    )
    assert_grads_close(grads, expected)


@pytest.mark.slow
def test_bf16_accumulates_in_f32():
    """Small gradients survive: in bf16, sums over microbatches would lose them."""
    schedule = gpipe(2, 48)
    params = make_params(schedule.num_stages, jnp.bfloat16)
    tokens, targets = make_batch(schedule.num_microbatches)
    step = pipeline_value_and_grad(
        stage_fn, loss_fn, schedule=schedule, mesh=make_mesh(pp=2), embed_fn=embed_fn
    )
    _, grads = step(params, tokens, targets)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}

    @jax.jit
    def one(params, tokens, targets):
        def loss(params):
            x = embed_fn(params.embed, tokens)
            for s in range(schedule.num_stages):
                x = stage_fn(jax.tree.map(lambda a: a[s], params.stages), x)  # noqa: B023
            return loss_fn(params.head, x, targets) / schedule.num_microbatches

        return jax.grad(loss)(params)

    parts = [one(params, tokens[m], targets[m]) for m in range(48)]
    exact = jax.tree.map(lambda *p: sum(np.asarray(a, np.float64) for a in p), *parts)
    # The parts are bf16 on both sides and fused differently: a part may differ in its
    # last place (2**-8), and the errors of 48 parts average out.
    assert_grads_close(grads, exact, rtol=2**-9)


def dropout_stage(params, x, *, key):
    keep = jax.random.bernoulli(key, 0.8, x.shape)
    return x + jnp.where(keep, jnp.tanh(x @ params["up"]) @ params["down"], 0.0)


def dropout_embed(params, tokens, *, key):
    x = embed_fn(params, tokens)
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_dropout_depends_on_stage_and_microbatch_only(remat):
    """Schedules of four stages and eight microbatches give the same numbers."""
    stage = jax.checkpoint(dropout_stage) if remat else dropout_stage
    params, batch = make_params(4), make_batch(8)
    key = jax.random.key(7)
    results = []
    for schedule in (dualpipe(4, 8), dualpipev(2, 8), zb1p(4, 8)):
        step = pipeline_value_and_grad(
            stage,
            loss_fn,
            schedule=schedule,
            mesh=make_mesh(pp=schedule.num_ranks),
            embed_fn=dropout_embed,
        )
        results.append(step(params, *batch, key=key))

    def one(params, m, tokens, targets):
        x = dropout_embed(params.embed, tokens, key=microbatch_key(key, 4, m))
        for s in range(4):
            stage_params = jax.tree.map(lambda a: a[s], params.stages)  # noqa: B023
            x = dropout_stage(stage_params, x, key=microbatch_key(key, s, m))
        return loss_fn(params.head, x, targets)

    def mean(params):
        losses = jnp.stack([one(params, m, *(a[m] for a in batch)) for m in range(8)])
        return losses.mean(), losses

    (_, expected_losses), expected = jax.jit(jax.value_and_grad(mean, has_aux=True))(
        params
    )
    for (losses, _), grads in results:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)  # f32 fusion
        assert_grads_close(grads, expected)


@pytest.mark.slow
def test_another_key_gives_another_dropout():
    step = pipeline_value_and_grad(
        dropout_stage,
        loss_fn,
        schedule=dualpipev(1, 2),
        mesh=make_mesh(pp=1),
        embed_fn=dropout_embed,
    )
    params, batch = make_params(2), make_batch(2)
    first, again, other = (
        step(params, *batch, key=jax.random.key(seed))[0][0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


@pytest.mark.slow
def test_tied_embedding():
    schedule = dualpipe(2, 4)

    def tied_loss(params, y, targets):
        embed, scale = params
        return cross_entropy(y @ embed.T * scale, targets)

    params = make_params(schedule.num_stages)
    params = PipelineParams(params.stages, params.embed, jnp.float32(1.5))
    batch = make_batch(schedule.num_microbatches)
    step = pipeline_value_and_grad(
        stage_fn,
        tied_loss,
        schedule=schedule,
        mesh=make_mesh(pp=2),
        embed_fn=embed_fn,
        tied=True,
    )
    (losses, _), grads = step(params, *batch)

    def mean(params):
        def one(tokens, targets):
            x = embed_fn(params.embed, tokens)
            for s in range(schedule.num_stages):
                x = stage_fn(jax.tree.map(lambda a: a[s], params.stages), x)  # noqa: B023
            return tied_loss((params.embed, params.head), x, targets)

        losses = jnp.stack([one(*(a[m] for a in batch)) for m in range(4)])
        return losses.mean(), losses

    (_, expected_losses), expected = jax.value_and_grad(mean, has_aux=True)(params)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)  # f32 fusion
    assert_grads_close(grads, expected)


@pytest.mark.slow
def test_integer_parameters_have_zero_gradients():
    def stage(params, x):
        return stage_fn(params, x) * params["sign"].astype(x.dtype)

    schedule = dualpipev(1, 2)
    params = make_params(2)
    stages = {**params.stages, "sign": jnp.array([1, -1], jnp.int32)}
    step = pipeline_value_and_grad(
        stage, loss_fn, schedule=schedule, mesh=make_mesh(pp=1), embed_fn=embed_fn
    )
    _, grads = step(PipelineParams(stages, params.embed, params.head), *make_batch(2))
    assert grads.stages["sign"].dtype == np.int32
    assert not grads.stages["sign"].any()
    assert grads.stages["up"].any()


# What follows fails before anything is compiled.


def build(schedule=None, mesh=None, stage=stage_fn, loss=loss_fn, **options):
    schedule = schedule or one_f_one_b(2, 4)
    mesh = mesh or make_mesh(pp=2)
    options.setdefault("embed_fn", embed_fn)
    return pipeline_value_and_grad(stage, loss, schedule=schedule, mesh=mesh, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "stage"}, r"axis_name='stage' is not an axis .*\('pp',\)"),
        ({"schedule": one_f_one_b(4, 4)}, r"num_ranks=4 must equal .* 2; make"),
        ({"data_axes": ("dp",)}, r"data_axes=\('dp',\) must name mesh axes other"),
        ({"data_axes": "pp"}, r"data_axes='pp' must be a tuple of names: \('pp',\)"),
        ({"aux_reduction": "max"}, r"aux_reduction='max' must be one of"),
        (
            {"schedule": one_f_one_b(2, 4).forward_only()},
            r"no backward tasks; use pipeline_forward",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def without_axis():
    params = make_params(2)
    return PipelineParams(
        {**params.stages, "scale": jnp.ones(3)}, params.embed, params.head
    )


@pytest.mark.parametrize(
    ("options", "params", "batch", "message"),
    [
        ({}, {"stages": 1}, make_batch(4), r"params is a dict; wrap it: PipelineP"),
        ({}, PipelineParams({}), make_batch(4), r"stages holds no arrays"),
        ({}, without_axis(), make_batch(4), r"\['scale'\] has shape \(3,\); its first"),
        ({}, make_params(2), make_batch(3), r"inputs has shape \(3, 4, 6\); its first"),
        (
            {"stage": lambda p, x: x[..., :3]},
            make_params(2),
            make_batch(4),
            r"stage_fn turns float32\[4, 6, 16\] into float32\[4, 6, 3\]; a stage must",
        ),
        (
            {"embed_fn": None},
            make_params(2),
            make_batch(4),
            r"inputs has dtype int32; activations must be floating.*pass embed_fn",
        ),
        (
            {"loss": lambda p, y, t: (y @ p).mean(-1)},
            make_params(2),
            make_batch(4),
            r"loss_fn returns float32\[4, 6\]; it must return a scalar",
        ),
        (
            {"loss": lambda p, y, t: t.sum()},
            make_params(2),
            make_batch(4),
            r"loss_fn returns a int32 scalar; it must be floating",
        ),
        (
            {"mesh": make_mesh(pp=2, dp=3), "data_axes": ("dp",)},
            make_params(2),
            make_batch(4),
            r"second axis must be a multiple of 3",
        ),
    ],
)
def test_bad_arguments(options, params, batch, message):
    with pytest.raises(ValueError, match=message):
        build(**options)(params, *batch)


def test_stack_stages_refuses_unequal_stages():
    with pytest.raises(ValueError, match=r"stages\[1\] differs from stages\[0\]"):
        stack_stages([{"w": jnp.ones(2)}, {"w": jnp.ones(3)}])
    with pytest.raises(ValueError, match="is empty"):
        stack_stages([])
