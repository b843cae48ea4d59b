"""Invalid arguments raise before anything is compiled, with a remedy."""

import jax.numpy as jnp
import pytest

from dualpipe_jax import one_f_one_b
from dualpipe_jax.executor.pipeline import (
    PipelineParams,
    pipeline_value_and_grad,
    stack_stages,
)
from tests.executor.toy import (
    embed_fn,
    loss_fn,
    make_batch,
    make_mesh,
    make_params,
    stage_fn,
)


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
