"""Steps lowered, compiled and exported before they are called, or differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

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
        ((PARAMS, X), {"targets": X, "key": KEY}),
    ],
    ids=["", "by name"],
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


def test_an_exported_step():
    step = make_step()
    check = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    exported = jax.export.export(step, disabled_checks=[check])(PARAMS, X, X)
    everywhere = NamedSharding(LAYOUT["mesh"], PartitionSpec())
    args = jax.device_put((PARAMS, X, X), everywhere)
    results = jax.jit(exported.call)(*args)
    jax.tree.map(np.testing.assert_array_equal, results, step(PARAMS, X, X))


def test_reverse_mode_is_refused_with_a_remedy():
    step, forward = make_step(), pipeline_forward(stage, **LAYOUT)
    for function, message in (
        (lambda p: step(p, X, X)[0][0].mean(), "it returns gradients itself"),
        (lambda p: jax.jit(step)(p, X, X)[1].stages.sum(), "it returns gradients"),
        (lambda p: forward(p, X).sum(), "use pipeline_value_and_grad"),
    ):
        with pytest.raises(ValueError, match=f"in reverse mode.*{message}"):
            jax.eval_shape(jax.grad(function), PARAMS)


def test_forward_mode_gives_a_product_with_the_hessian():
    step = pipeline_value_and_grad(
        stage, lambda head, y, target: jnp.sum((y - target) ** 2), **LAYOUT
    )

    def loss(params):
        first, second = params.stages
        return jnp.mean((first * second * X - X) ** 2)

    tangent = PipelineParams(jnp.array([1.0, -2.0]))
    _, product = jax.jvp(lambda p: step(p, X, X)[1], (PARAMS,), (tangent,))
    _, expected = jax.jvp(jax.grad(loss), (PARAMS,), (tangent,))
    # Sums of small integers, which f32 holds.
    np.testing.assert_array_equal(product.stages, expected.stages)
