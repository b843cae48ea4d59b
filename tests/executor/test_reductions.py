"""Auxiliary outputs are summed in dtypes that hold the sums, for every schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax import PipelineParams, dualpipe, one_f_one_b
from dualpipe_jax.executor.pipeline import pipeline_value_and_grad
from tests.executor.toy import make_mesh

# Values of every microbatch: the sum of 300 overflows or is rounded in these dtypes.
VALUES = {
    "bool": (True, jnp.bool_),
    "int8": (1, jnp.int8),
    "uint8": (200, jnp.uint8),
    "bfloat16": (1, jnp.bfloat16),
    "float16": (500, jnp.float16),
    "float8": (1, jnp.float8_e4m3fn),
}
SUMS = {"bool": "int32", "int8": "int32", "uint8": "uint32"}


def aux():
    return {name: jnp.asarray(value, dtype) for name, (value, dtype) in VALUES.items()}


def results(schedule, reduction, overlap=None):
    """Returns the auxiliary outputs, of stages and loss, on two data-parallel ranks."""
    step = pipeline_value_and_grad(
        lambda w, x: (x * w, aux()),
        lambda head, y, target: (jnp.mean((y - target) ** 2), aux()),
        schedule=schedule,
        mesh=make_mesh(pp=2, dp=2),
        data_axes=("dp",),
        aux_reduction=reduction,
        overlap=overlap,
    )
    x = jnp.ones((schedule.num_microbatches, 2, 1))
    (_, out), _ = step(PipelineParams(jnp.ones(schedule.num_stages)), x, x)
    return out


@pytest.mark.parametrize(
    ("schedule", "reduction", "overlap"),
    [
        (dualpipe(2, 300), "sum", None),
        (dualpipe(2, 300), "mean", True),
        (one_f_one_b(2, 300), "mean", None),
    ],
    ids=lambda each: getattr(each, "kind", each),
)
def test_sums_and_means(schedule, reduction, overlap):
    out = results(schedule, reduction, overlap)
    for name, (value, _) in VALUES.items():
        if reduction == "sum":
            # The dtypes are exact here: products of small integers.
            expected, dtype = 2 * 300 * value, SUMS.get(name, "float32")
        else:
            expected, dtype = value, "float32"
        np.testing.assert_array_equal(out.loss[name], expected)
        stages = np.full(schedule.num_stages, expected)
        np.testing.assert_array_equal(out.stages[name], stages)
        assert {out.loss[name].dtype, out.stages[name].dtype} == {np.dtype(dtype)}


def test_a_stack_keeps_the_dtype_of_what_is_not_summed():
    """On one device per rank; means over data axes are floating."""
    schedule = dualpipe(2, 4)
    step = pipeline_value_and_grad(
        lambda w, x: (x * w, aux()),
        lambda head, y, target: (jnp.mean(y), aux()),
        schedule=schedule,
        mesh=make_mesh(pp=2),
        aux_reduction="stack",
    )
    x = jnp.ones((4, 2, 1))
    (_, out), _ = step(PipelineParams(jnp.ones(2)), x, x)
    for name, (value, dtype) in VALUES.items():
        for part, shape in ((out.loss, (4,)), (out.stages, (2, 4))):
            assert part[name].dtype == dtype
            wide = part[name].astype(jnp.float32)
            np.testing.assert_array_equal(wide, np.full(shape, value))
    over_data = jax.eval_shape(lambda: results(schedule, "stack"))
    assert {leaf.dtype for leaf in jax.tree.leaves(over_data)} == {np.dtype("float32")}


def test_gradients_of_bools_stay_bools():
    step = pipeline_value_and_grad(
        lambda w, x: x * w,
        lambda head, y, target: jnp.mean(jnp.where(head, y, target)),
        embed_fn=lambda embed, x: jnp.where(embed, x, 0.0),
        schedule=dualpipe(2, 4),
        mesh=make_mesh(pp=2),
    )
    mask, x = jnp.array([True]), jnp.ones((4, 2, 1))
    _, grads = jax.eval_shape(step, PipelineParams(jnp.ones(2), mask, mask), x, x)
    assert {grads.embed.dtype, grads.head.dtype} == {np.dtype("bool")}
