"""Stages with different functions: first, middle and last."""

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax import dualpipe
from dualpipe_jax.executor.pipeline import pipeline_forward, pipeline_value_and_grad
from tests.executor.toy import (
    SCHEDULES,
    WIDTH,
    assert_grads_close,
    embed_fn,
    loss_fn,
    make_batch,
    make_mesh,
    make_params,
    stage_fn,
)
from tests.reference import reference_forward


def first(params, x):
    """Keeps more than the others, in other shapes."""
    hidden = jnp.sin(x @ params["up"]) * jnp.cos(x @ params["up"])
    return stage_fn(params, x) + jnp.exp(-hidden.sum(-1, keepdims=True))


def last(params, x):
    """Reads only one of its parameters."""
    return x * jnp.cos(x @ params["up"][:, :WIDTH])


def fns_of(schedule, wrap=lambda fn: fn):
    middle = [wrap(stage_fn)] * (schedule.num_stages - 2)
    return [wrap(first), *middle, wrap(last)]


def with_aux(fn):
    """Wraps a stage to return as aux a sum, and whether it is the last."""

    def stage(params, x):
        y = fn(params, x)
        return y, {"sum": y.sum(), "is_last": jnp.int32(fn is last)}

    return stage


def run_stages(fns, params, x):
    for number, fn in enumerate(fns):
        x = fn(jax.tree.map(lambda leaf, n=number: leaf[n], params.stages), x)
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["dualpipe", "dualpipe, overlap", "zb1p, overlap", "dualpipev, whole backwards"],
)
def test_gradients_of_stages_that_differ(kind):
    name, *options = kind.split(", ")
    schedule = SCHEDULES[name]
    if "whole backwards" in options:
        schedule = schedule.with_whole_backwards()
    fns = fns_of(schedule)
    params = make_params(schedule.num_stages)
    tokens, targets = make_batch(schedule.num_microbatches)
    step = pipeline_value_and_grad(
        fns_of(schedule, with_aux),
        loss_fn,
        schedule=schedule,
        mesh=make_mesh(pp=schedule.num_ranks),
        embed_fn=embed_fn,
        overlap="overlap" in options,
    )
    (losses, aux), grads = step(params, tokens, targets)

    def one(params, tokens, targets):
        y = run_stages(fns, params, embed_fn(params.embed, tokens))
        return loss_fn(params.head, y, targets)

    def mean(params):
        losses = jax.vmap(one, (None, 0, 0))(params, tokens, targets)
        return losses.mean(), losses

    (_, expected_losses), expected = jax.value_and_grad(mean, has_aux=True)(params)
    assert_grads_close(losses, expected_losses)
    # f32: `first` takes the exponential of a sum over the hidden units, of up to 32.
    assert_grads_close(grads, expected, rtol=5e-5)
    assert aux["is_last"].tolist() == [0] * (schedule.num_stages - 1) + [
        schedule.num_microbatches
    ]
    y = jax.vmap(lambda t: run_stages(fns, params, embed_fn(params.embed, t)))(tokens)
    assert_grads_close(aux["sum"][-1], y.sum())


@pytest.mark.slow
def test_forward_of_stages_that_differ():
    schedule = SCHEDULES["dualpipe"]
    params = make_params(schedule.num_stages)
    tokens, _ = make_batch(schedule.num_microbatches)
    forward = pipeline_forward(
        fns_of(schedule),
        schedule=schedule,
        mesh=make_mesh(pp=schedule.num_ranks),
        embed_fn=embed_fn,
    )
    numbered = iter(range(schedule.num_stages * schedule.num_microbatches))

    def by_number(stage, x):
        return fns_of(schedule)[next(numbered) % schedule.num_stages](stage, x)

    expected = reference_forward(by_number, schedule=schedule, embed_fn=embed_fn)
    assert_grads_close(forward(params, tokens), expected(params, tokens))


def make_step(fns, schedule):
    return pipeline_value_and_grad(
        fns,
        loss_fn,
        schedule=schedule,
        mesh=make_mesh(pp=schedule.num_ranks),
        embed_fn=embed_fn,
    )


def test_the_same_function_compiles_once():
    schedule = dualpipe(2, 4)
    args = make_params(2), *make_batch(4)
    one = make_step(stage_fn, schedule).lower(*args).as_text()
    # Two functions that are equal without being the same object, as methods are.
    assert make_step([stage_fn] * 2, schedule).lower(*args).as_text() == one
    assert make_step([stage_fn, last], schedule).lower(*args).as_text() != one


def test_variants_share_the_buffers():
    """A slot has room for what the largest variant keeps, not for all of them."""
    schedule = dualpipe(2, 4)
    args = make_params(2), *make_batch(4)
    alone = [make_step(fn, schedule).buffers(*args) for fn in (stage_fn, last)]
    both = make_step([stage_fn, last], schedule).buffers(*args)
    sizes = [buffers.residuals for buffers in alone]
    assert max(sizes) <= both.residuals < sum(sizes)


def test_one_function_a_stage():
    with pytest.raises(ValueError, match=r"stage_fn has 3 functions.*num_stages=2"):
        make_step([stage_fn] * 3, dualpipe(2, 4))


def test_all_stages_have_the_same_aux():
    step = make_step([with_aux(stage_fn), stage_fn], dualpipe(2, 4))
    with pytest.raises(ValueError, match="zeros where a stage has nothing"):
        step.lower(make_params(2), *make_batch(4))
