"""Pipelines with more than arrays: trees, aux, bf16, keys, tied weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax import dualpipe, dualpipev, gpipe, zb1p
from dualpipe_jax.executor.pipeline import (
    PipelineParams,
    microbatch_key,
    pipeline_value_and_grad,
)
from tests.executor.toy import (
    assert_grads_close,
    cross_entropy,
    embed_fn,
    loss_fn,
    make_batch,
    make_mesh,
    make_params,
    stage_fn,
)


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
@pytest.mark.parametrize(
    ("reduction", "overlap"),
    [("sum", None), ("mean", None), ("stack", None), ("stack", True)],
)
def test_trees_and_auxiliary_outputs(reduction, overlap):
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
        overlap=overlap,
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
    """Schedules of four stages and eight microbatches give the same numbers, with
    whole and split backwards.
    """
    stage = jax.checkpoint(dropout_stage) if remat else dropout_stage
    params, batch = make_params(4), make_batch(8)
    key = jax.random.key(7)
    results = []
    cases = [(dualpipev(2, 8), None), *([] if remat else [(zb1p(4, 8), True)])]
    for schedule, overlap in cases:
        step = pipeline_value_and_grad(
            stage,
            loss_fn,
            schedule=schedule,
            mesh=make_mesh(pp=schedule.num_ranks),
            embed_fn=dropout_embed,
            overlap=overlap,
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
