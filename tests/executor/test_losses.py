"""Losses with weights, and keys: what is refused, and which functions get a key."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax import PipelineParams, Weighted, gpipe, pipeline_value_and_grad
from dualpipe_jax.executor.keys import takes_key
from tests.executor.toy import make_mesh

PARAMS, X = PipelineParams(jnp.ones((2, 4, 4))), jnp.ones((2, 3, 4))


def make_step(loss_fn):
    return pipeline_value_and_grad(
        lambda params, x: x @ params,
        loss_fn,
        schedule=gpipe(2, 2),
        mesh=make_mesh(pp=2),
    )


@pytest.mark.parametrize(
    ("weighted", "message"),
    [
        (lambda y: Weighted(y.sum(), y[0]), r"weight=float32\[4\]\); weight must be a"),
        (
            lambda y: Weighted(y.sum(), 1j),
            "weight must be a scalar, a number or a bool",
        ),
        (lambda y: Weighted(y, 1), r"loss_fn returns float32\[3, 4\]; it must return"),
        (lambda y: Weighted(1, 1), "loss_fn returns a int32 scalar; it must be float"),
    ],
)
def test_sums_that_are_none(weighted, message):
    with pytest.raises(ValueError, match=message):
        make_step(lambda head, y, targets: weighted(y)).lower(PARAMS, X, X)


@pytest.mark.parametrize("weight", [True, 2, 0.5, jnp.int8(3), jnp.bfloat16(1)])
def test_weights_of_any_kind(weight):
    def loss_fn(head, y, targets):
        return Weighted(y.sum().astype(jnp.bfloat16), weight), {"sum": y.sum()}

    (losses, aux), grads = jax.eval_shape(make_step(loss_fn), PARAMS, X, X)
    assert (losses.shape, losses.dtype) == ((2,), jnp.float32)
    assert aux["sum"].shape == ()
    assert grads.stages.dtype == jnp.float32


def with_key(x, *, key):
    return x


def without_key(x):
    return x


@pytest.mark.parametrize(
    ("fn", "takes"),
    [
        (with_key, True),
        (jax.checkpoint(with_key), True),
        (jax.jit(with_key), True),
        (functools.partial(with_key, 1.0), True),
        (lambda x, key=None: x, True),
        (lambda *args, **options: args, True),
        (without_key, False),
        (jax.checkpoint(without_key), False),
        (jax.jit(without_key), False),
        (lambda *args: args, False),
        (lambda key, /: key, False),
        (max, False),
    ],
)
def test_functions_with_a_parameter_key_get_one(fn, takes):
    assert takes_key(fn) == takes


def test_a_key_that_no_function_takes():
    step = make_step(lambda head, y, targets: y.sum())
    with pytest.raises(ValueError, match="none of the pipeline's functions has a par"):
        step.lower(PARAMS, X, X, key=jax.random.key(0))
