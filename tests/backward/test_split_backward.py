"""I and W against `jax.vjp`: numbers, matrix products, and what is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dualpipe_jax import compat
from dualpipe_jax.backward.flop_count import flops, jaxpr_flops
from dualpipe_jax.backward.split_backward import SplitBackward, split_vjp
from tests.backward.split_cases import (
    BATCH,
    CASES,
    LAYERS,
    D,
    Q,
    X,
    mlp,
    normal,
    tanh_layer,
    weights,
)

every_case = pytest.mark.parametrize("name", CASES)
# Cases that take seconds to trace and compile run only in the full suite.
every_case_in_time = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if "nnx" in name else name
        for name in CASES
    ],
)


@pytest.fixture(autouse=True)
def flax_promotes_bf16(request):
    name = getattr(request.node, "callspec", None) and request.node.callspec.id
    mode = "standard" if name and "bf16" in name else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


@functools.cache
def plan_of(name):
    fn, params, *inputs, _ = CASES[name]
    return SplitBackward.trace(fn, params, *inputs)


def cotangents(outputs):
    return jax.tree.map(lambda y: (y * 0.5 + 1).astype(y.dtype), outputs)


def products(jaxpr):
    """Counts the matrix products in a program, those in a loop's body once."""
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple) else (value,):
                if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                    count += products(item)
    return count


def num_bytes(structs):
    return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(structs))


def assert_close(got, want, rtol=1e-5):
    """Close relative to each leaf's maximum: order of sums and fusion differ."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        if w.dtype != jax.dtypes.float0:
            g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
            np.testing.assert_allclose(
                g, w, rtol=0, atol=rtol * np.abs(w).max() + 1e-30
            )


@every_case_in_time
def test_equals_jax_vjp(name):
    fn, params, *inputs, _ = CASES[name]
    plan = plan_of(name)

    @jax.jit
    def reference(params, *inputs):
        outputs, pullback = jax.vjp(fn, params, *inputs)
        return outputs, pullback(cotangents(outputs))

    @jax.jit
    def split(params, *inputs):
        outputs, residuals = plan.forward(params, *inputs)
        cts = cotangents(outputs)
        input_cts, wgrad_residuals = plan.backward_input(params, residuals, cts)
        param_cts = plan.backward_weights(params, residuals, wgrad_residuals)
        both = plan.backward(params, residuals, cts)
        return outputs, (param_cts, *input_cts), (both[0], *both[1])

    with jax.default_matmul_precision("highest"):
        outputs, want = reference(params, *inputs)
        got_outputs, got, whole = split(params, *inputs)
    # bf16 products round to 8 bits, at places that depend on XLA's fusion.
    rtol = 2e-2 if "bf16" in name else 1e-5
    assert_close(got_outputs, outputs, rtol)
    assert_close(got, want, rtol)
    assert_close(whole, want, rtol)


@every_case
def test_multiplies_no_more_than_the_whole_backward(name):
    fn, params, *inputs, _ = CASES[name]

    def forward(*args):
        return jax.tree.leaves(jax.vjp(fn, *args))  # including what it saves

    def both(*args):
        outputs, pullback = jax.vjp(fn, *args)
        return outputs, pullback(cotangents(outputs))

    programs = plan_of(name).programs
    f = flops(forward, params, *inputs)
    b = flops(both, params, *inputs) - f
    assert jaxpr_flops(programs.f) <= f
    assert jaxpr_flops(programs.b) <= b
    assert jaxpr_flops(programs.i) + jaxpr_flops(programs.w) <= 1.01 * b


@every_case
def test_each_product_is_in_its_half(name):
    *_, expected = CASES[name]
    programs = plan_of(name).programs
    assert tuple(map(products, (programs.f, programs.i, programs.w))) == expected
    assert products(programs.b) == sum(expected[1:])


@every_case
def test_keeps_less_than_jax_vjp(name):
    fn, params, *inputs, _ = CASES[name]
    plan = plan_of(name)
    pullback = jax.eval_shape(lambda *args: jax.vjp(fn, *args)[1], params, *inputs)
    # jax.vjp keeps its arguments too; of these the inputs cost memory per call.
    saved = num_bytes(pullback.opaque_residuals) + num_bytes(plan.inputs)
    assert num_bytes(plan.residuals) <= saved


def shapes(structs):
    return [(s.dtype.name, *s.shape) for s in structs]


F32, MASK = ("float32", BATCH, D), ("bool", BATCH, D)


@pytest.mark.parametrize(
    ("name", "residuals", "wgrad_residuals"),
    [
        # gelu's derivative is recomputed from the products, and the input of each
        # layer from the previous product; one cotangent per layer crosses.
        ("mlp", [F32] * 5, [F32] * 4),
        ("remat whole", [F32], [F32] * 7),
        # q, k and v share their input; softmax keeps its products and its row sums.
        ("tied", [F32] * 3, [F32] * 2),
        ("scan", [("float32", LAYERS, BATCH, D)] * 2, [("float32", LAYERS, BATCH, D)]),
        (
            "scan in bf16",  # no cast or transposed weight, though jax.vjp keeps both
            [("bfloat16", LAYERS, BATCH, D)] * 2,
            [("bfloat16", LAYERS, BATCH, D)] * 2,
        ),
        (
            "scan, remat each",
            [("float32", LAYERS, BATCH, D)],
            [("float32", LAYERS, BATCH, D)] * 3,
        ),
        (
            "nested scan",
            [("float32", LAYERS, LAYERS, BATCH, D)] * 2,
            [("float32", LAYERS, LAYERS, BATCH, D)],
        ),
        # The masks as booleans, not the random bits.
        ("dropout", [F32, MASK, F32, MASK, F32], [F32] * 2),
        ("dropout, remat", [F32, ("uint32", 2)], [F32] * 3),
        ("embedding", [("int32", 4, 1), ("float32", 4, D)], [("float32", 4, D)]),
        # Two branches keep one product each and share a slot.
        ("switch", [F32, ("int32",), F32], [F32] * 2),
    ],
)
def test_what_is_kept_and_what_crosses(name, residuals, wgrad_residuals):
    plan = plan_of(name)
    assert shapes(plan.residuals) == residuals
    assert shapes(plan.wgrad_residuals) == wgrad_residuals


@pytest.mark.parametrize("name", ["nnx bf16"])
def test_a_transformer_block_keeps_a_third_of_what_jax_vjp_keeps(name):
    fn, params, x, _ = CASES[name]
    plan = plan_of(name)
    pullback = jax.eval_shape(lambda *args: jax.vjp(fn, *args)[1], params, x)
    # jax.vjp keeps bf16 copies of the weights among other things: per microbatch.
    assert num_bytes(plan.residuals) < num_bytes(pullback.opaque_residuals) / 2.5
    weight_shapes = {p.shape for p in jax.tree.leaves(params) if p.ndim > 1}
    assert weight_shapes.isdisjoint(s.shape for s in plan.residuals)


def test_constants_are_not_kept():
    table = np.arange(BATCH * D, dtype=np.float32).reshape(BATCH, D)

    def fn(w, x):
        positions = jnp.outer(jnp.arange(BATCH, dtype=jnp.float32), jnp.ones(D))
        noise = jax.random.normal(jax.random.key(0), x.shape)
        return jnp.tanh(x * jnp.sin(positions) * table * noise) @ w

    plan = SplitBackward.trace(fn, Q, X)
    assert shapes(plan.residuals) == [F32]
    assert shapes(plan.wgrad_residuals) == [F32]


def test_reads_of_weights_are_marked():
    plan = SplitBackward.trace(lambda w, x: jnp.sin(x @ w), Q, X)
    # W reads x; only I reads the product, for the sine's derivative.
    assert [s.shape for s in plan.residuals] == [X.shape, X.shape]
    assert plan.read_by_weights == (True, False)


def test_sums_for_norm_scales_may_run_early():
    def norm(p, x):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        scale = lax.broadcast_in_dim(p, x.shape, (1,))
        return (x - mean) * lax.rsqrt(variance + 1e-6) * scale

    scale = jnp.ones(D)
    early = SplitBackward.trace(norm, scale, X)
    late = SplitBackward.trace(norm, scale, X, early_reductions=False)
    assert shapes(early.wgrad_residuals) == [("float32", D)]
    assert shapes(late.wgrad_residuals) == [F32]
    _, backward_input, backward_weights = split_vjp(norm, scale, X)
    ct = jnp.sin(3 * X)  # not y, which the norm's pullback maps to zero
    (dx,), saved = backward_input(ct)
    want = jax.vjp(norm, scale, X)[1](ct)
    assert_close((backward_weights(saved), dx), want)


def test_equal_bits_without_fusion():
    # Evaluated equation by equation, B and its halves run the same operations.
    def fn(ws, x):
        return tanh_layer(ws[0], tanh_layer(ws[1], x) + x) * tanh_layer(ws[0], x)

    def both(ws, x):
        outputs, pullback = jax.vjp(fn, ws, x)
        return outputs, pullback(outputs)

    jaxpr = jax.make_jaxpr(both)(weights(2), X)
    outputs, *want = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *weights(2), X)
    plan = SplitBackward.trace(fn, weights(2), X)
    y, residuals = plan.forward(weights(2), X)
    (dx,), wgrad_residuals = plan.backward_input(weights(2), residuals, y)
    dws = plan.backward_weights(weights(2), residuals, wgrad_residuals)
    for got, expected in zip([y, *dws, dx], [outputs, *want], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_xla_counts_no_more_than_for_the_whole_backward():
    # Wide, so that W's repeated elementwise work is small beside the products.
    width, batch = 1024, 64
    ws = [normal(seed, width, width) for seed in range(4)]
    x = normal(5, batch, width)
    plan = SplitBackward.trace(mlp, ws, x)
    y, residuals = jax.eval_shape(plan.forward, ws, x)
    _, wgrad_residuals = jax.eval_shape(plan.backward_input, ws, residuals, y)

    def count(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    i = count(plan.backward_input, ws, residuals, y)
    w = count(plan.backward_weights, ws, residuals, wgrad_residuals)
    pullback = jax.eval_shape(lambda ws, x: jax.vjp(mlp, ws, x)[1], ws, x)
    b = count(lambda pullback, y: pullback(y), pullback, y)
    assert i + w <= 1.01 * b


def test_remat_saves_memory_within_one_program():
    # Without barriers XLA would merge the recomputed products with those of F.
    width, batch = 64, 32
    ws = [normal(seed, width, width) for seed in range(4)]
    x = normal(5, batch, width)

    def step(fn):
        plan = SplitBackward.trace(fn, ws, x)

        def run(ws, x):
            y, residuals = plan.forward(ws, x)
            input_cts, wgrad_residuals = plan.backward_input(ws, residuals, y)
            return input_cts, plan.backward_weights(ws, residuals, wgrad_residuals)

        return jax.jit(run).lower(ws, x).compile().cost_analysis()["flops"]

    product = 2 * batch * width * width
    assert step(mlp) < 12.9 * product  # 4 for F, 4 for I, 4 for W
    assert step(jax.checkpoint(mlp)) > 15.9 * product  # and 4 recomputed


@pytest.mark.parametrize("frozen", ["base", "all"])
def test_frozen_parameters_are_read_but_have_no_gradients(frozen):
    params = {
        "a": normal(1, D, 1),
        "b": normal(2, 1, D),
        "base": Q,
        "count": jnp.int32(3),
    }
    trainable = [frozen != "all" and name in "ab" for name in params]

    def fn(p, x):
        return jnp.sin(x @ p["base"] * p["count"].astype(x.dtype) + x @ p["a"] @ p["b"])

    plan = SplitBackward.trace(fn, params, X, trainable=trainable)
    kept = {s.shape for s in (*plan.residuals, *plan.wgrad_residuals)}
    assert kept.isdisjoint({params["base"].shape, params["a"].shape})
    # Of three products: F three, I three, W one for each matrix that is trained.
    assert products(plan.programs.w) == sum(trainable)
    y, pullback = jax.vjp(fn, params, X)
    outputs, residuals = plan.forward(params, X)
    want, dx = pullback(cotangents(y))
    inputs, crossing = plan.backward_input(params, residuals, cotangents(y))
    want = {
        name: leaf if trained else np.zeros(params[name].shape, jax.dtypes.float0)
        for (name, leaf), trained in zip(want.items(), trainable, strict=True)
    }
    assert_close((outputs, inputs), (y, (dx,)))
    assert_close(plan.backward_weights(params, residuals, crossing), want)
    assert_close(plan.backward(params, residuals, cotangents(y)), (want, (dx,)))


def test_one_flag_for_each_parameter():
    with pytest.raises(
        ValueError, match=r"trainable=\[True\] must have one entry .* 2"
    ):
        SplitBackward.trace(lambda w, x: x @ w[0] @ w[1], (Q, Q), X, trainable=[True])
