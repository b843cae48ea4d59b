"""Side inputs: every stage reads its microbatch's row, and nothing is kept or sent."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dualpipe_jax import (
    PipelineParams,
    dualpipe,
    gpipe,
    pipeline_forward,
    pipeline_value_and_grad,
)
from tests.executor.toy import assert_grads_close, make_mesh

PARAMS = PipelineParams(jnp.array([2.0, 3.0]))
X = jnp.ones((4, 6, 8))
MASK = jnp.ones((4, 6, 8), bool)
SIDE = P()


def plain(params, x):
    return jnp.sin(x * params)


def masked(params, x, side):
    return jnp.where(side["mask"], jnp.sin(x * params), x)


def make_step(stage_fn=masked, side=SIDE, axes=None, **options):
    return pipeline_value_and_grad(
        stage_fn,
        lambda head, y, targets: jnp.mean((y - targets) ** 2),
        schedule=dualpipe(2, 4),
        mesh=make_mesh(**(axes or {"pp": 2})),
        side=side,
        **options,
    )


@pytest.mark.parametrize("overlap", [False, True], ids=["compact", "overlapped"])
def test_side_inputs_are_neither_kept_nor_sent(overlap):
    kept = make_step(overlap=overlap).buffers(PARAMS, X, X, side={"mask": MASK})
    alone = make_step(plain, None, overlap=overlap).buffers(PARAMS, X, X)
    assert kept == alone


def test_forward_reads_numbers_and_keys():
    def stage(params, x, side):
        noise = jax.random.normal(side["key"], x.shape)
        return (x + noise * params) * side["position"].astype(x.dtype)

    forward = pipeline_forward(
        stage, schedule=gpipe(2, 3), mesh=make_mesh(pp=2), side=P()
    )
    x, keys = X[:3], jax.random.split(jax.random.key(0), 3)
    side = {"key": keys, "position": jnp.array([1, -2, 3], jnp.int8)}
    outputs = forward(PARAMS, x, side=side)
    for m in range(3):
        y = x[m]
        for params in PARAMS.stages:
            y = stage(params, y, jax.tree.map(lambda leaf, m=m: leaf[m], side))
        assert_grads_close(outputs[m], y)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (True, r"side\['mask'\] is a bool, True; it must be a jax.sharding.Part"),
        (P("dp"), r"divides the axis of microbatches.*PartitionSpec\(None, 'dp'\)"),
        (P(None, "pp"), "but 'pp' is the pipeline's axis"),
        (P(None, ("dp", "tp")), r"the mesh has no axis 'tp'; it has \('pp', 'dp'\)"),
    ],
)
def test_specs_that_do_not_fit_the_mesh(specs, message):
    with pytest.raises(ValueError, match=message):
        make_step(side={"mask": specs}, axes={"pp": 2, "dp": 4})


@pytest.mark.parametrize(
    ("specs", "side", "message"),
    [
        (None, MASK, "side was passed to a step whose stage_fn takes none"),
        (P(), None, r"side=None holds no arrays, but the step was made with side="),
        ({"a": P()}, {"mask": MASK}, "is not a prefix of side's tree"),
        (P(), {"mask": MASK[:3]}, r"side\['mask'\] has shape \(3, 6, 8\); its first"),
        (P(None, "dp"), {"mask": MASK[:, 0, 0]}, r"\(4,\), too few axes for P"),
        (P(None, "dp"), {"mask": MASK}, "divides the axis of size 6 into 4 parts"),
    ],
)
def test_side_inputs_that_do_not_fit_their_specs(specs, side, message):
    step = make_step(side=specs, axes={"pp": 2, "dp": 4})
    with pytest.raises(ValueError, match=message):
        step.lower(PARAMS, X, X, side=side)
