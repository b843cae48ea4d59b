"""Interleaved F and B: results as in sequence, exchanges under the other's compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal
from jax.sharding import AxisType, PartitionSpec as P

from dualpipe_jax.backward.interleave import interleave
from dualpipe_jax.backward.interleaved import run_interleaved
from dualpipe_jax.backward.split_backward import SplitBackward

DEVICES, LAYERS, TOKENS, WIDTH = 4, 3, 16, 8


def on_devices(function, num_arrays):
    mesh = jax.make_mesh((DEVICES,), ("ep",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(P("ep"),) * num_arrays,
            out_specs=P("ep"),
            check_vma=False,
        )
    )


def exchange(x):
    return lax.all_to_all(x, "ep", split_axis=0, concat_axis=0, tiled=True)


def stage(layers, x, *, remat=False, weighted=False, fetched=False):
    """Like a mixture of experts: compute, dispatch, compute, and combine.

    Weights of some rows may be sent with them, and weights of experts be fetched.
    """

    def attend(layer, x):
        return x + jnp.tanh(x @ layer["a"]) @ layer["b"]

    for layer in layers:
        x = (jax.checkpoint(attend) if remat else attend)(layer, x)
        rows = exchange(x)
        if weighted:
            rows *= 1 + exchange(x[:DEVICES, :1]).sum(keepdims=True)
        product = _multiply_fetched if fetched else jnp.matmul
        x = x + exchange(jax.nn.silu(product(rows, layer["c"])) @ layer["d"])
    return x


@jax.checkpoint
def _multiply_fetched(rows, weight):
    """The backward pass fetches the weight again, and sends its gradient back."""
    return rows @ exchange(weight)


def operands(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        values = rng.standard_normal(shape) / np.sqrt(WIDTH)
        return jnp.asarray(values, jnp.float32)

    layers = [
        {name: normal(DEVICES * WIDTH, WIDTH) for name in "abcd"} for _ in range(LAYERS)
    ]
    return layers, *(normal(DEVICES * TOKENS, WIDTH) for _ in range(3))


@pytest.mark.parametrize(
    "options",
    [{}, {"remat": True}, {"weighted": True}, {"fetched": True}],
    ids=["plain", *"rwf"],
)
def test_in_turns_as_one_after_the_other(options):
    def run(layers, x, other, dy):
        def fn(layers, x):
            return stage(layers, x, **options)

        plan = SplitBackward.trace(fn, layers, x, platform="cpu")
        _, residuals = plan.forward(layers, other)
        forward, backward = plan.forward_and_backward(
            (layers, x), (layers, residuals, dy)
        )
        assert plan.programs.pair(plan.programs) is not None
        one, pullback = jax.vjp(fn, layers, x)
        expected = plan.forward(layers, x), plan.backward(layers, residuals, dy)
        _, pullback = jax.vjp(fn, layers, other)
        grads, dx = pullback(dy)
        return (
            (forward, backward),
            expected,
            (forward[0], backward),
            (one, (grads, (dx,))),
        )

    got, expected, values, by_jax = on_devices(run, 4)(*operands())
    # float32: XLA may fuse a piece differently from the whole.
    for a, b in ((got, expected), (values, by_jax)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b
        )


def turns_of(jaxpr):
    """Returns the equations between the barriers that hold many values."""
    turns = [[]]
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "optimization_barrier" and len(eqn.invars) > 1:
            turns.append([])
        else:
            turns[-1].append(eqn)
    return turns


@pytest.mark.parametrize("remat", [False, True])
def test_every_exchange_has_products_of_the_other_pass_beside_it(remat):
    plans = []

    def run(layers, x):
        def fn(layers, x):
            return stage(layers, x, remat=remat)

        plans.append(SplitBackward.trace(fn, layers, x, platform="cpu"))
        return x

    jax.eval_shape(on_devices(run, 2), *operands()[:2])
    programs = plans[0].programs
    # All processes of a run must build the same program.
    again = {str(interleave(programs.f, programs.b, 1)) for _ in range(4)}
    assert again == {str(programs.pair(programs))}
    turns = turns_of(programs.pair(programs))
    sending = [
        turn for turn in turns if any(e.primitive.name == "all_to_all" for e in turn)
    ]
    # Two exchanges per layer and pass, one per turn.
    assert len(sending) == 4 * LAYERS
    for turn in sending:
        (send,) = (e for e in turn if e.primitive.name == "all_to_all")
        beside = [e for e in turn if e is not send]
        assert any(e.primitive.name == "dot_general" for e in beside)
        # Independent of all else in its turn: they may overlap entirely.
        assert not any(v in e.invars for e in beside for v in send.outvars)
        assert not any(v in e.outvars for e in beside for v in send.invars)

    def products(jaxpr):
        return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)

    assert products(programs.pair(programs)) == products(programs.f) + products(
        programs.b
    )
    # Weight gradients remain to hide the messages to the neighbours.
    assert any(e.primitive.name == "dot_general" for e in turns[-1])


def test_weights_are_fetched_beside_tokens_and_their_gradients_go_home_last():
    plans = []

    def run(layers, x):
        fn = functools.partial(stage, fetched=True)
        plans.append(SplitBackward.trace(fn, layers, x, platform="cpu"))
        return x

    jax.eval_shape(on_devices(run, 2), *operands()[:2])
    programs = plans[0].programs
    turns = turns_of(programs.pair(programs))
    sizes = [
        [e.outvars[0].aval.size for e in turn if e.primitive.name == "all_to_all"]
        for turn in turns
    ]
    tokens, weights = TOKENS * WIDTH, WIDTH * WIDTH
    *sent, last = [each for each in sizes if each]
    # F fetches with its dispatch, the recomputation in B with the tokens before it.
    both, alone = sorted([tokens, weights]), [tokens]
    assert [sorted(each) for each in sent] == [both, both, alone, alone] * LAYERS
    assert last == [weights] * LAYERS and sizes[-1] == last
    # Each is computed from a product of the last turn, or of one before.
    assert sum(e.primitive.name == "dot_general" for e in turns[-1]) >= LAYERS


def test_a_small_exchange_is_not_waited_for_behind_a_large_one():
    plans = []

    def run(layers, x):
        fn = functools.partial(stage, weighted=True)
        plans.append(SplitBackward.trace(fn, layers, x, platform="cpu"))
        return x

    jax.eval_shape(on_devices(run, 2), *operands()[:2])
    (plan,) = plans
    turns = turns_of(plan.programs.pair(plan.programs))
    number = 0
    for turn in turns:
        exchanges = [e for e in turn if e.primitive.name == "all_to_all"]
        sizes = [e.outvars[0].aval.size for e in exchanges]
        small = [e for e, n in zip(exchanges, sizes, strict=True) if n == DEVICES]
        number += len(small)
        if len(small) < len(exchanges):
            waiting = {v for e in small for v in e.outvars}
            for e in turn:
                if any(v in waiting for v in e.invars if not isinstance(v, Literal)):
                    waiting.update(e.outvars)
                    assert e.primitive.name != "dot_general"
    assert number == 2 * LAYERS


def test_an_other_plan_runs_beside():
    """F of one function and B of another."""

    def run(layers, x, other, dy):
        plans = [
            SplitBackward.trace(
                functools.partial(stage, weighted=weighted), layers, x, platform="cpu"
            )
            for weighted in (False, True)
        ]
        _, residuals = plans[1].forward(layers, other)
        got = plans[0].forward_and_backward(
            (layers, x), (layers, residuals, dy), plans[1]
        )
        expected = (
            plans[0].forward(layers, x),
            plans[1].backward(layers, residuals, dy),
        )
        return got, expected

    got, expected = on_devices(run, 4)(*operands())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )


def test_without_an_exchange_there_is_no_order_to_decide():
    def layer(w, x):
        return jnp.tanh(x @ w)

    w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    plan = SplitBackward.trace(layer, w, x)
    assert plan.programs.pair(plan.programs) is None
    y, residuals = plan.forward(w, x)
    forward, backward = plan.forward_and_backward((w, x), (w, residuals, y))
    jax.tree.map(np.testing.assert_array_equal, forward, (y, residuals))
    expected = plan.backward(w, residuals, y)
    jax.tree.map(np.testing.assert_array_equal, backward, expected)


def test_two_forward_passes_as_one_after_the_other():
    """The second pass reads, layer by layer, results of the first."""

    def first(layers, x):
        handed = []
        for layer in layers:
            handed.append(jnp.tanh(x @ layer["a"]))
            x = stage([layer], x)
        return x, handed

    def second(layers, x, handed):
        for layer, each in zip(layers, handed, strict=True):
            x = stage([layer], x + each)
        return x

    jaxprs = []

    def run(layers, x, other):
        def both():
            return run_interleaved(first, second, layers, [x], [other], platform="cpu")

        jaxprs.append(jax.make_jaxpr(both)().jaxpr)
        alone, handed = first(layers, x)
        return both(), (alone, second(layers, other, handed))

    got, expected = on_devices(run, 3)(*operands()[:3])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )
    sending = [
        turn
        for turn in turns_of(inlined(jaxprs[0]))
        if any(e.primitive.name == "all_to_all" for e in turn)
    ]
    assert len(sending) == 4 * LAYERS
    for turn in sending[:-1]:  # nothing is left after the last one
        (send,) = (e for e in turn if e.primitive.name == "all_to_all")
        beside = [e for e in turn if e is not send]
        assert any(e.primitive.name == "dot_general" for e in beside)
        assert not any(v in e.invars for e in beside for v in send.outvars)
        assert not any(v in e.outvars for e in beside for v in send.invars)


def test_what_is_handed_too_late_is_run_one_after_the_other():
    def step(layers, x, other):
        def first(layers, x):
            y = stage(layers, x)
            return y, y  # from its end, for the start of the second

        def second(layers, x, handed):
            return stage(layers, x + handed)

        one, two = run_interleaved(first, second, layers, [x], [other])
        return (one, two), (stage(layers, x), stage(layers, other + stage(layers, x)))

    got, expected = on_devices(step, 3)(*operands()[:3])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )


def inlined(jaxpr):
    """Returns the inner jaxpr if a jaxpr is only a call of it, else the jaxpr."""
    while len(jaxpr.eqns) == 1 and "jaxpr" in jaxpr.eqns[0].params:
        jaxpr = jaxpr.eqns[0].params["jaxpr"]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return jaxpr
