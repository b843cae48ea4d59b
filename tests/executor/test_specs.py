"""How arrays lie on the mesh: specs that do not fit, and axes of several types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from dualpipe_jax import PipelineParams, one_f_one_b
from dualpipe_jax.executor.pipeline import pipeline_forward, pipeline_value_and_grad
from tests.executor.toy import make_mesh

PARAMS = PipelineParams({"w": jnp.arange(1.0, 9.0).reshape(2, 4), "b": jnp.ones(2)})
X = jnp.arange(24.0).reshape(3, 2, 4)


def stage(params, x):
    # On a mesh with two devices along tp, a device has two of the four weights.
    w = jax.lax.all_gather(params["w"], "tp", tiled=True)
    return x * w[None] + params["b"]


def build(param_specs, mesh=None):
    return pipeline_value_and_grad(
        stage,
        lambda head, y, target: jnp.mean((y - target) ** 2),
        schedule=one_f_one_b(2, 3),
        mesh=mesh or make_mesh(pp=2, tp=2, dp=2),
        data_axes=("dp",),
        param_specs=param_specs,
    )


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"w": P("tp")}, r"param_specs is a dict; pass PipelineParams\(stages="),
        (P("tp"), r"param_specs is a \w+; pass PipelineParams"),
        ({}, "param_specs is a dict"),
        (PipelineParams("tp"), r"param_specs\.stages is a str, 'tp'; it must be a jax"),
        (
            PipelineParams({"w": NamedSharding(make_mesh(tp=2), P("tp"))}),
            r"param_specs\.stages\['w'\] is a NamedSharding, .* must be a jax",
        ),
        (
            PipelineParams(P("ep")),
            r"but the mesh has no axis 'ep'; it has \('pp', 'tp'",
        ),
        (PipelineParams(embed=P(None, ("dp", "ep"))), r"\.embed is .*no axis 'ep'"),
        (PipelineParams(P("pp")), "but 'pp' is the pipeline's axis: .*leave both out"),
        (PipelineParams(head=P(("tp", "pp"))), "but 'pp' is the pipeline's axis"),
        (PipelineParams(P("tp", "tp")), "name each mesh axis once"),
    ],
)
def test_bad_specs(specs, message):
    with pytest.raises(ValueError, match=message):
        build(specs)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"v": P("tp")},
            r"param_specs\.stages must be a prefix of the tree params\.st",
        ),
        ([P("tp"), P()], r"param_specs\.stages must be a prefix of the tree"),
        (P("tp"), r"params\.stages\['b'\] has shape \(1,\), too few axes for .*'tp'"),
        ({"w": P(("tp", "dp")), "b": None}, None),
        ({"w": P(("tp", "dp", "more")), "b": P()}, r"\['w'\].* of size 4 into 8 parts"),
    ],
)
def test_specs_that_do_not_fit_the_parameters(stages, message):
    mesh = make_mesh(pp=1, tp=2, dp=2, more=2)
    step = pipeline_value_and_grad(
        lambda params, x: x * params["b"],
        lambda head, y, target: jnp.mean(y),
        schedule=one_f_one_b(1, 3),
        mesh=mesh,
        param_specs=PipelineParams(stages),
    )
    params = PipelineParams({"w": jnp.ones((1, 4)), "b": jnp.ones(1)})
    if message is None:
        jax.eval_shape(step, params, X, X)
        return
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, params, X, X)


@pytest.mark.parametrize("explicit", [("pp",), ("dp", "tp"), ("pp", "tp", "dp")])
def test_axes_of_several_types(explicit):
    axes = ("pp", "tp", "dp")
    types = [AxisType.Explicit if a in explicit else AxisType.Auto for a in axes]
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=tuple(types))
    specs = PipelineParams({"w": P("tp"), "b": None})
    (losses, _), grads = build(specs, mesh)(PARAMS, X, X)
    w, b = PARAMS.stages["w"], PARAMS.stages["b"]
    y = (X * w[0][None, None] + b[0]) * w[1][None, None] + b[1]
    np.testing.assert_allclose(losses, jnp.mean((y - X) ** 2, (1, 2)), rtol=1e-6)
    # In f32; the gradient of the last bias is that of the mean.
    last = 2 * jnp.mean(y - X)
    np.testing.assert_allclose(np.asarray(grads.stages["b"])[1], last, rtol=1e-6)
    forward = pipeline_forward(
        stage,
        schedule=one_f_one_b(2, 3),
        mesh=mesh,
        data_axes=("dp",),
        param_specs=specs,
    )
    np.testing.assert_allclose(forward(PARAMS, X), y, rtol=1e-6)
