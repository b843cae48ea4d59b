"""Positions without a layer: nothing there is read, and nothing is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh

from dualpipe_jax import PipelineParams, compat
from dualpipe_jax.backward.flop_count import flops
from dualpipe_jax.backward.split_backward import SplitBackward
from dualpipe_jax.deepseek import DeepSeek
from dualpipe_jax.deepseek.model.layers import Layer
from dualpipe_jax.deepseek.model.layout import DENSE, MOE, NONE, Layout
from dualpipe_jax.deepseek.model.pipeline import DeepSeekPipeline
from dualpipe_jax.deepseek.model.trees import bias_state
from eplb_jax import ExpertParallel
from tests.deepseek.model.sizes import SMALL, small

MICROBATCHES = 4
# So large that the balance loss shows in the gradient.
ALPHA = 400.0
# Position 0 is dense or has experts; position 1 has experts or no layer.
UNEVEN = Layout(((0,), (1, 2)), first_k_dense_replace=1)
# Stages of one position, which has a layer of one of these kinds.
ONE_DENSE, ONE_MOE = Layout(((0,),), 1), Layout(((0,),), 0)
DENSE_OR_MOE = Layout(((0,), (1,)), first_k_dense_replace=1)
DENSE_OR_NONE = Layout(((0,), ()), first_k_dense_replace=1)
MOE_OR_NONE = Layout(((0,), ()), first_k_dense_replace=0)
ANY_KIND = Layout(((0,), (1,), ()), first_k_dense_replace=1)


def make(layout, balance_loss=0.0):
    arch = small(
        num_hidden_layers=sum(map(len, layout.layers)),
        first_k_dense_replace=layout.first_k_dense_replace,
    )
    return DeepSeekPipeline(
        model=DeepSeek(architecture=arch, balance_loss=balance_loss),
        layout=layout,
        num_microbatches=MICROBATCHES,
        mesh=AbstractMesh((len(layout.layers), 1, 1), ("pp", "dp", "ep")),
        parallel=ExpertParallel(),
    )


def shapes_of(pipeline):
    return jax.eval_shape(lambda: pipeline.init(jax.random.key(0)))


def zeros_of(pipeline):
    shapes = shapes_of(pipeline).stages
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def random(pipeline):
    """Stages' parameters; NaN where a stage does not use them."""
    rng = np.random.default_rng(0)

    def fill(unused_G, tree):
        def draw(leaf):
            value = rng.standard_normal(leaf.shape).astype(np.float32) / 2
            value[unused_G] = np.nan
            return value

        return jax.tree.map(draw, tree)

    weights = []
    for position, tree in enumerate(shapes_of(pipeline).stages):
        kind_G = pipeline.layout.kind_GP[:, position]
        needs = {"dense": kind_G == DENSE, "moe": kind_G == MOE}
        weights.append(
            {
                name: fill(~needs.get(name, kind_G != NONE), part)
                for name, part in tree.items()
            }
        )
    return weights


def pick(pipeline, stage, weights):
    """What the pipeline gives a stage; its number is traced there too."""
    prepared = pipeline.prepare_params(
        PipelineParams(weights), pipeline.init_buffers()
    ).stages
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, stage, keepdims=False), prepared
    )


def activations():
    rng = np.random.default_rng(1)
    return rng.standard_normal((2, 2, 5, SMALL.hidden_size)).astype(np.float32)


@functools.cache
def passes(layout, balance_loss=0.0):
    """(stage, weights, x, ct) -> (y, aux), (gradients of weights, of x)."""
    pipeline = make(layout, balance_loss)

    @jax.jit
    def run(stage, weights, x, ct):
        def forward(weights, x):
            return pipeline.stage(pick(pipeline, stage, weights), x)

        y, pullback, aux = jax.vjp(forward, weights, x, has_aux=True)
        return (y, aux), pullback(ct)

    return run


def layer_alone(layout, stage, weights, x):
    """The stage's layers, each as a module that has no padding."""
    for position, layer in enumerate(layout.layers[stage]):
        kind, other = "dense", "moe"
        if layer >= layout.first_k_dense_replace:
            kind, other = other, kind
        has = {"has_dense": kind == "dense", "has_moe": kind == "moe"}
        module = nnx.eval_shape(
            lambda has=has: Layer(SMALL, ExpertParallel(), **has, key=jax.random.key(0))
        )
        tree = {name: part for name, part in weights[position].items() if name != other}
        tree = jax.tree.map(lambda leaf: leaf[stage], tree)
        bias = [bias_state(jnp.zeros(SMALL.n_routed_experts))] if kind == "moe" else []
        block = nnx.merge(nnx.graphdef(module), tree, *bias)
        x = block.attend(x)
        x = block.feed_forward(x) if kind == "dense" else block.mix(x, None)[0]
    return x


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_what_padding_holds_reaches_nothing(stage):
    """NaN in padding reaches neither outputs nor gradients."""
    layout = UNEVEN
    weights = random(make(layout))
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(weights))
    x, ct = activations()
    (y, aux), (grads, dx) = passes(layout)(stage, weights, x, ct)
    for value in jax.tree.leaves((y, aux, grads, dx)):
        assert np.isfinite(value).all()
    assert aux.keys() == {"0", "1"}
    for position, stats in aux.items():
        has_experts = layout.kind_GP[stage, int(position)] == MOE
        choices = x[..., 0].size * SMALL.num_experts_per_tok
        assert stats["tokens_per_expert"].sum() == has_experts * choices
        assert (stats["balance_loss"] > 0) == has_experts
    alone = functools.partial(layer_alone, layout, stage, weights)
    want = jax.jit(alone)(x)
    assert np.abs(want - x).max() > 0.1
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)  # other fusions
    # A used parameter has a gradient; one in padding, or of another stage, has none.
    for position, tree in enumerate(grads):
        kind = layout.kind_GP[stage, position]
        for name, part in tree.items():
            is_used = kind in {"dense": {DENSE}, "moe": {MOE}}.get(name, {DENSE, MOE})
            for leaf in jax.tree.leaves(part):
                assert np.any(leaf[stage]) == is_used, (position, name)
                assert not np.any(np.delete(leaf, stage, axis=0))


COSTLY = {"dot_general", "ragged_dot_general", "while", "scan"}


def inner_jaxprs(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield compat.open_jaxpr(item)[0]


def count_costly(jaxpr, into_conds=True):
    """Products and loops, those inside a loop once more."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name in COSTLY
        if into_conds or eqn.primitive.name != "cond":
            count += sum(count_costly(inner, into_conds) for inner in inner_jaxprs(eqn))
    return count


def outer_conds(jaxpr):
    """Those that stand in no other one."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            yield [compat.open_jaxpr(branch)[0] for branch in eqn.params["branches"]]
        else:
            for inner in inner_jaxprs(eqn):
                yield from outer_conds(inner)


@functools.cache
def programs(layout):
    """A stage's forward pass, and its backward pass as the pipeline cuts it.

    By name, each as (function, shapes of its arguments).
    """
    pipeline = make(layout)
    params = jax.eval_shape(lambda: pick(pipeline, 0, zeros_of(pipeline)))
    x = jax.ShapeDtypeStruct(activations()[0].shape, jnp.float32)
    plan = SplitBackward.trace(pipeline.stage, params, x, has_aux=True)
    return {
        "F": (plan.forward, (params, x)),
        "I": (plan.backward_input, (params, plan.residuals, x)),
        "W": (plan.backward_weights, (params, plan.residuals, plan.crossing)),
        "B": (plan.backward, (params, plan.residuals, x)),
    }


@pytest.mark.parametrize("layout", [MOE_OR_NONE, DENSE_OR_NONE, ANY_KIND])
def test_padding_costs_no_product_forward_or_backward(layout):
    assert NONE in layout.kinds(0)
    for function, arguments in programs(layout).values():
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        assert count_costly(jaxpr, into_conds=False) == 0
        costs = [sorted(map(count_costly, branches)) for branches in outer_conds(jaxpr)]
        # AD may have made more conditions, that have nothing to do with products.
        ((none, layer),) = [cost for cost in costs if any(cost)]
        assert none == 0 < layer


@pytest.mark.parametrize("layout", [MOE_OR_NONE, ANY_KIND])
def test_the_backward_pass_of_a_stage_with_padding_is_cut_in_two(layout):
    costs = {name: flops(f, *args) for name, (f, args) in programs(layout).items()}
    assert costs["I"] + costs["W"] == costs["B"]
    # W has one product for each product of F with a weight: all but the attention's.
    batch, length, _ = activations()[0].shape
    widths = SMALL.num_attention_heads * (SMALL.qk_head_dim + SMALL.v_head_dim)
    assert costs["W"] == costs["F"] - 2 * batch * length**2 * widths


def test_the_count_sees_products_outside_of_conds():
    """Where every stage has a layer, its attention is under no `cond`."""
    for layout in (DENSE_OR_MOE, ONE_DENSE):
        forward, arguments = programs(layout)["F"]
        jaxpr = jax.make_jaxpr(forward)(*arguments).jaxpr
        # Two each for queries and keys, two of the mixing and one of the heads.
        assert count_costly(jaxpr, into_conds=False) >= 7


@pytest.mark.parametrize("name", ["F", "B"])
def test_a_position_of_two_kinds_runs_one_of_them(name):
    costs = {}
    for layout in (DENSE_OR_MOE, ONE_DENSE, ONE_MOE):
        function, arguments = programs(layout)[name]
        # Of a `cond`, the more expensive branch is counted.
        costs[layout] = flops(function, *arguments)
    assert costs[ONE_DENSE] != costs[ONE_MOE]
    assert costs[DENSE_OR_MOE] == max(costs[ONE_DENSE], costs[ONE_MOE])


@pytest.mark.slow
def test_a_stage_adds_its_balance_loss_to_the_gradient():
    """As much as a microbatch has in the mean over microbatches."""
    plain = make(ONE_MOE)
    weights, (x, ct) = random(plain), activations()

    @jax.jit
    def explicit(weights, x):
        def loss(weights, x):
            y, aux = plain.stage(pick(plain, 0, weights), x)
            balance = aux["0"]["balance_loss"]
            return (y * ct).sum() + ALPHA / MICROBATCHES * balance, balance

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, x)

    (_, aux), grads = passes(ONE_MOE, ALPHA)(0, weights, x, ct)
    want, balance = explicit(weights, x)
    np.testing.assert_allclose(aux["0"]["balance_loss"], balance, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, grads, want)  # float32, gradients of up to some tens
