"""The layer against every expert on every token, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dualpipe_jax.backward.split_backward import SplitBackward
from eplb_jax.layer.mixture import ExpertWeights, mix_experts
from eplb_jax.layer.parallel import ExpertParallel
from eplb_jax.layer.physical import physical_weights
from eplb_jax.layer.routing import sequence_balance_loss
from tests.eplb.layer.moe_cases import (
    DEVICES,
    DIM,
    EXPERTS,
    MESH,
    OUT,
    PHYSICAL,
    SPREAD,
    TOKENS,
    K,
    X,
    check_close,
    layer,
    on_eight,
    placement,
    program,
    reference,
    specs,
)


# Routers do not depend on placements, so each is tried with one of the two.
@pytest.mark.parametrize(
    ("tables", "changes"),
    [
        (None, {}),
        (placement(0), {"router": "softmax", "num_groups": 1, "topk_groups": 1}),
    ],
    ids=["logical, sigmoid", "physical, softmax"],
)
@pytest.mark.slow
def test_one_device(tables, changes):
    got, stats = program(**changes)(tables)
    check_close(got, reference(**changes))
    assert stats.tokens_per_expert.sum() == TOKENS * K
    assert stats.overflow == 0


@pytest.mark.parametrize(
    ("choice", "seed", "check_vma"),
    [
        pytest.param("spread", None, False, marks=pytest.mark.slow),
        pytest.param("spread", 0, True, marks=pytest.mark.slow),
        pytest.param("nearest", 1, False, marks=pytest.mark.slow),
        pytest.param("balanced", 2, True, marks=pytest.mark.slow),
    ],
)
def test_eight_devices(choice, seed, check_vma):
    parallel = ExpertParallel("ep", DEVICES, num_nodes=2, replica_choice=choice)
    tables = None if seed is None else placement(seed)
    got, stats = program(parallel, check_vma=check_vma)(tables)
    check_close(got, reference())
    routed = layer().route(X).experts
    want = np.bincount(np.ravel(routed), minlength=EXPERTS)
    np.testing.assert_array_equal(stats.tokens_per_expert, want)
    if tables is not None:
        by_expert = np.zeros(EXPERTS, int)
        np.add.at(
            by_expert, tables.physical_to_logical_map, stats.tokens_per_physical_expert
        )
        np.testing.assert_array_equal(by_expert, want)
    assert stats.overflow == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nodes": 2, "route": "by_node"},
        # More nodes than choices, and 32 rows for the 18 that arrive on average.
        {"num_nodes": 4, "route": "by_node", "apply_scores": "after", "num_rows": 32},
        {"apply_scores": "after"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_other_routes_to_the_experts_and_back(changes):
    parallel = ExpertParallel("ep", DEVICES, **changes)
    tables = placement(6)
    got, stats = program(parallel)(tables)
    assert stats.overflow == 0
    check_close(got, reference())
    _, direct = SPREAD()(tables)
    np.testing.assert_array_equal(
        stats.tokens_per_physical_expert, direct.tokens_per_physical_expert
    )
    np.testing.assert_array_equal(stats.tokens_per_expert, direct.tokens_per_expert)


@pytest.mark.slow
def test_a_new_placement_compiles_nothing():
    run = SPREAD()
    one, other = (run(placement(seed))[0] for seed in (3, 4))
    assert run.cache_size() == 1
    check_close(one, other)


@pytest.mark.slow
def test_held_weights_are_the_gathered_ones():
    parallel = ExpertParallel("ep", DEVICES)
    model, tables = layer(parallel), placement(5)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    weights = ExpertWeights(*(leaf[...] for leaf in model.experts))

    def gather(weights):
        return physical_weights(weights, tables, num_devices=DEVICES, axis_name="ep")

    gather = jax.shard_map(
        gather, mesh=MESH, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
    )
    held = jax.jit(gather)(weights)
    for ours, leaf in zip(held, weights, strict=True):
        np.testing.assert_array_equal(ours, leaf[tables.physical_to_logical_map])

    def run(params, held, x):
        return nnx.merge(graph, params, rest)(x, tables, physical=held)[0]

    run = jax.shard_map(
        run,
        mesh=MESH,
        in_specs=(specs(params), P("ep"), P("ep")),
        out_specs=P("ep"),
        check_vma=False,
    )
    again = jax.jit(run)(params, held, X)
    afresh = jax.jit(lambda params, x: on_eight(tables, graph, params, rest, x)[0])
    np.testing.assert_array_equal(again, afresh(params, X))


@pytest.mark.slow
def test_fp8_payload():
    dim = 256
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((16, dim)), jnp.float32).at[3].set(0.0)
    experts = jnp.asarray(rng.integers(0, 8, (16, 2)), jnp.int32)
    gate, up = (
        jnp.asarray(rng.standard_normal((8, dim, 16)) / 16, jnp.float32) for _ in "ab"
    )
    weights = ExpertWeights(gate, up, jnp.swapaxes(gate, 1, 2))

    def run(payload):
        parallel = ExpertParallel("ep", DEVICES, payload=payload)

        def local(x, experts, weights):
            mixed = mix_experts(
                x, experts, jnp.ones(experts.shape), weights, None, parallel
            )
            return mixed[0]

        sharded = jax.shard_map(
            local, mesh=MESH, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
        )

        def loss(x):
            y = sharded(x, experts, weights)
            return (y**2).sum(), y

        grads, y = jax.jit(jax.grad(loss, has_aux=True))(x)
        return y, grads

    plain, small = run("plain"), run("fp8")
    assert (plain[0] != small[0]).any()
    for exact, rounded in zip(plain, small, strict=True):
        # e4m3 has 3 bits of mantissa: 2^-4 at most, about 2^-5 on average.
        error = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
        assert error < 2**-4
    assert not np.asarray(small[0])[3].any()


@pytest.mark.slow
def test_sequences_and_dtypes():
    model, x = layer(dtype=jnp.bfloat16), X.reshape(4, 12, DIM)
    y, stats = nnx.jit(lambda model, x: model(x))(model, x)
    assert y.shape == x.shape and y.dtype == x.dtype
    want = sequence_balance_loss(model.route(x).scores, K).mean()
    np.testing.assert_allclose(stats.balance_loss, want, rtol=1e-6)  # one float32 mean
    # bfloat16 weights and products, sums of 8 and 12
    exact = reference()[0].reshape(x.shape)
    assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)
    small = layer(param_dtype=jnp.bfloat16)
    assert all(leaf[...].dtype == jnp.bfloat16 for leaf in small.experts)
    assert small.router[...].dtype == jnp.float32
    y, _ = nnx.jit(lambda model, x: model(x))(small, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


@pytest.mark.slow
def test_its_backward_splits_into_input_and_weight_halves():
    graph, params, rest = nnx.split(layer(), nnx.Param, ...)
    tables = placement(7)

    def fn(params, x):
        return nnx.merge(graph, params, rest)(x, tables)[0]

    plan = SplitBackward.trace(fn, params, X)

    def halves(params, x):
        y, residuals = plan.forward(params, x)
        (dx,), wgrad_residuals = plan.backward_input(params, residuals, OUT)
        return y, (plan.backward_weights(params, residuals, wgrad_residuals), dx)

    def whole(params, x):
        y, pullback = jax.vjp(fn, params, x)
        return y, pullback(OUT)

    check_close(jax.jit(halves)(params, X), jax.jit(whole)(params, X))
    # No weights of physical experts among the residuals: they are gathered again.
    assert not [
        s.shape for s in plan.residuals if len(s.shape) > 2 and PHYSICAL in s.shape
    ]
