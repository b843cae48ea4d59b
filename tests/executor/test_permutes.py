"""On CPU devices a permute over another axis waits for its own group only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from dualpipe_jax import (
    PipelineParams,
    compat,
    gpu_mesh,
    one_f_one_b,
    pipeline_forward,
    pipeline_value_and_grad,
)
from dualpipe_jax.executor.permutes import within_groups
from tests.executor.toy import make_mesh

SCALE = np.arange(4, dtype=np.float32)[None]
TURN = [(0, 1), (1, 0)]


def in_loops_and_branches(x):
    part = lax.ppermute(x, "sp", [(0, 1)])  # the first gets zeros
    to_itself = jax.jit(lambda x: lax.ppermute(x * SCALE, ("sp",), [(1, 1)]))(x)
    scanned, _ = lax.scan(
        lambda c, _: (lax.ppermute(c * SCALE, "sp", TURN), None), x, length=3
    )
    chosen = lax.cond(
        lax.psum(x.sum(), "sp") > 0, lambda x: lax.ppermute(x, "sp", TURN), jnp.sin, x
    )
    _, repeated = lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, lax.ppermute(c[1], "sp", TURN)), (0, x)
    )
    return part, to_itself, scanned, chosen, repeated


def test_equals_the_permute():
    def both(x):
        jaxpr = jax.make_jaxpr(in_loops_and_branches)(x)
        rewritten = within_groups(jaxpr)
        assert str(jaxpr).count("ppermute[") == 5
        assert "ppermute[" not in str(rewritten)
        # Once more: nothing is left to do.
        assert within_groups(rewritten) is rewritten
        return in_loops_and_branches(x), tuple(compat.evaluate(rewritten, x))

    run = jax.shard_map(
        both,
        mesh=make_mesh(pp=2, sp=2),
        in_specs=P("sp"),
        out_specs=P("sp"),
        check_vma=False,
    )
    expected, results = jax.jit(run)(1 + jnp.arange(8.0).reshape(2, 4))
    jax.tree.map(np.testing.assert_array_equal, results, expected)


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_all_of_the_users_functions(overlap):
    """The pipeline's own permutes remain, one for each pattern of pairs."""

    def permutes(turn, mesh=None):
        mesh = mesh or make_mesh(pp=2, sp=2)
        options = {
            "embed_fn": lambda scale, x: turn(x * scale),
            "schedule": one_f_one_b(2, 2),
            "mesh": mesh,
            "overlap": overlap,
        }
        step = pipeline_value_and_grad(
            lambda w, x: turn(x @ w), lambda head, y, t: turn((y - t).sum()), **options
        )
        forward = pipeline_forward(lambda w, x: turn(x @ w), **options)
        params, x = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=NamedSharding(mesh, P())
            ),
            (PipelineParams(jnp.ones((2, 4, 4)), jnp.ones(())), jnp.ones((2, 3, 4))),
        )
        lowered = step.lower(params, x, x), forward.lower(params, x)
        return [each.as_text().count("collective_permute") for each in lowered]

    def turn(x):
        return lax.ppermute(x, "sp", TURN)

    plain = permutes(lambda x: x)
    assert permutes(turn) == plain
    on_gpus = permutes(turn, gpu_mesh("h100", {"pp": 2, "sp": 2}))
    assert all(a > b for a, b in zip(on_gpus, plain, strict=True))
