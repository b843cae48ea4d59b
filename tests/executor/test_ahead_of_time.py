"""Steps lowered, compiled and exported before they are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax import PipelineParams, one_f_one_b
from dualpipe_jax.executor.pipeline import pipeline_forward, pipeline_value_and_grad
from tests.executor.toy import make_mesh

PARAMS = PipelineParams(jnp.array([2.0, 3.0]))
X = jnp.arange(4.0)[:, None]
KEY = jax.random.key(0)
LAYOUT = {"schedule": one_f_one_b(2, 4), "mesh": make_mesh(pp=2)}


def stage(w, x, key=None):
    return w * x if key is None else w * x + jax.random.uniform(key)


def make_step():
    return pipeline_value_and_grad(
        stage, lambda head, y, target: jnp.sum(y - target), **LAYOUT
    )


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((PARAMS, X, X), {}),
        ((PARAMS, X, X, KEY), {}),
        ((PARAMS, X), {"targets": X, "key": KEY}),
    ],
    ids=["", "key", "by name"],
)
def test_a_step_takes_what_it_was_lowered_with(args, kwargs):
    step = make_step()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    compiled = step.lower(*shapes, **kwargs).compile()
    results = compiled(*args, **kwargs)
    jax.tree.map(np.testing.assert_array_equal, results, step(*args, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"key": KEY}], ids=["", "key"])
def test_a_forward_pass_takes_what_it_was_lowered_with(kwargs):
    forward = pipeline_forward(stage, **LAYOUT)
    compiled = forward.lower(PARAMS, X, **kwargs).compile()
    outputs = compiled(PARAMS, X, **kwargs)
    np.testing.assert_array_equal(outputs, forward(PARAMS, X, **kwargs))
