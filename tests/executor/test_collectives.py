"""The pipeline's axis is refused inside the user's functions, wherever they hide it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dualpipe_jax import PipelineParams, dualpipe
from dualpipe_jax.executor.pipeline import pipeline_forward, pipeline_value_and_grad
from tests.executor.toy import make_mesh

PARAMS = PipelineParams(jnp.ones((2, 4, 4)), jnp.ones(()), jnp.ones(()))
X = jnp.ones((4, 2, 4))


def mean(x):
    return lax.pmean(x, ("pp", "dp"))


def in_scan(x):
    return lax.scan(lambda carry, _: (lax.psum(carry, "pp"), None), x, length=3)[0]


def in_branch(x):
    return lax.cond(x.sum() > 0, lambda x: lax.pmax(x, "pp"), lambda x: x, x)


def in_while(x):
    def body(carry):
        index, x = carry
        return index + 1, lax.ppermute(x, "pp", [(0, 1), (1, 0)])

    return lax.while_loop(lambda carry: carry[0] < 2, body, (0, x))[1]


def in_switch_of_a_rank(x):
    return lax.switch(lax.axis_index("pp"), [jnp.sin, jnp.cos], x)


@jax.custom_vjp
def with_rule(x):
    return x * 1.0


with_rule.defvjp(
    lambda x: (with_rule(x), None), lambda _, ct: (lax.psum(ct, ("pp", "dp")),)
)


@jax.custom_jvp
def with_tangent(x):
    return x * 1.0


@with_tangent.defjvp
def _(primals, tangents):
    return with_tangent(*primals), lax.psum(tangents[0], "pp")


def gathered(x):
    return lax.all_gather(x, "pp").sum(0)


HIDDEN = {
    "pmean": (mean, "psum"),
    "scan": (in_scan, "psum"),
    "cond": (in_branch, "pmax"),
    "while": (in_while, "ppermute"),
    "axis_index": (in_switch_of_a_rank, "axis_index"),
    "custom_vjp": (with_rule, "psum"),
    "custom_jvp": (with_tangent, "psum"),
    "remat": (jax.checkpoint(gathered), "all_gather"),
    "jit": (jax.jit(jax.jit(gathered)), "all_gather"),
    "vmap": (jax.vmap(gathered), "all_gather"),
}


def identity(x):
    return x


def build(embed=identity, stage=identity, loss=identity, overlap=None):
    return pipeline_value_and_grad(
        lambda w, x: stage(x @ w),
        lambda head, y, target: loss(jnp.mean((y * head - target) ** 2)),
        embed_fn=lambda scale, x: embed(x * scale),
        schedule=dualpipe(2, 4),
        mesh=make_mesh(pp=2, dp=2),
        data_axes=("dp",),
        overlap=overlap,
    )


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_names_the_function_and_the_primitive(hidden, overlap):
    function, primitive = HIDDEN[hidden]
    message = f"stage_fn uses {primitive} over 'pp', the pipeline's axis"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build(stage=function, overlap=overlap), PARAMS, X, X)


@pytest.mark.parametrize("hidden", ["custom_vjp", "cond", "axis_index"])
@pytest.mark.parametrize("part", ["embed", "loss"])
def test_of_the_other_functions(part, hidden):
    function, primitive = HIDDEN[hidden]
    if (part, hidden) == ("loss", "axis_index"):
        function = lambda loss: loss * lax.axis_index("pp").astype(loss.dtype)  # noqa: E731
    step = build(**{part: function})
    with pytest.raises(ValueError, match=f"{part}_fn uses {primitive} over 'pp'"):
        jax.eval_shape(step, PARAMS, X, X)


@pytest.mark.parametrize("part", ["embed", "stage"])
def test_of_a_forward_pass(part):
    functions = {"embed": lambda scale, x: x * scale, "stage": lambda w, x: x @ w}
    inner = functions[part]
    functions[part] = lambda *args: mean(inner(*args))
    forward = pipeline_forward(
        functions["stage"],
        embed_fn=functions["embed"],
        schedule=dualpipe(2, 4),
        mesh=make_mesh(pp=2, dp=2),
        data_axes=("dp",),
    )
    with pytest.raises(ValueError, match=f"{part}_fn uses psum over 'pp'"):
        jax.eval_shape(forward, PARAMS, X)


def test_other_axes_are_free():
    """So are an axis of `vmap` with the pipeline's name, and the axis's size."""

    def over_dp(x):
        rank = lax.axis_index("dp").astype(x.dtype)
        rows = jax.vmap(lambda row: lax.psum(row, "rows"), axis_name="rows")(x)
        return (lax.psum(x, "dp") + rank + rows) / lax.axis_size("pp")

    step = build(stage=over_dp, loss=lambda loss: lax.pmean(loss, "dp"))
    (losses, _), _ = jax.eval_shape(step, PARAMS, X, X)
    assert losses.shape == (4,)
