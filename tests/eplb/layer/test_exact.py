"""Exact balance on eight devices against every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from eplb_jax import ExpertParallel, ExpertTables, ExpertWeights, mix_experts
from eplb_jax.layer.fetch import (
    add_at_once,
    add_fetched,
    add_in_rounds,
    plan_fetch,
)
from eplb_jax.layer.mixture import Mixed, mix
from tests.eplb.layer import moe_cases
from tests.eplb.layer.moe_cases import (
    DEVICES,
    DIM,
    EXPERTS,
    HIDDEN,
    MESH,
    OUT,
    TOKENS,
    K,
    X,
    check_close,
    placement,
)

_RNG = np.random.default_rng(1)


def _normal(*shape):
    return jnp.asarray(_RNG.standard_normal(shape) / shape[1] ** 0.5, jnp.float32)


WEIGHTS = ExpertWeights(
    _normal(EXPERTS, DIM, HIDDEN),
    _normal(EXPERTS, DIM, HIDDEN),
    _normal(EXPERTS, HIDDEN, DIM),
)
SCORES = jnp.asarray(_RNG.random((TOKENS, K)), jnp.float32)


def _choices():
    """[tokens, top_k] expert ids, by what is special about them."""
    rng = np.random.default_rng(2)
    even = rng.permuted(np.tile(np.arange(EXPERTS), (TOKENS, 1)), axis=1)[:, :K]
    hot = np.where(rng.random((TOKENS, K)) < 0.9, 5, even)
    few = even.copy()
    few[: 3 * TOKENS // DEVICES] = -1  # three devices have padding only
    return {
        "even": even,
        "one expert has 90 % of the choices, so ids repeat": hot,
        "one expert has all": np.full((TOKENS, K), 11),
        "zero tokens on some devices": few,
        "unknown ids": np.where(rng.random((TOKENS, K)) < 0.3, 99, even),
        "no tokens": np.full((TOKENS, K), -1),
    }


def _dense(x, scores, weights, experts):
    chosen = (jax.nn.one_hot(experts, EXPERTS) * scores[..., None]).sum(axis=1)
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, weights.gate))
    hidden = hidden * jnp.einsum("td,edf->tef", x, weights.up)
    y = jnp.einsum("tef,efd,te->td", hidden, weights.down, chosen)
    return (y * OUT).sum(), y


@functools.cache
def _reference():
    return jax.jit(jax.grad(_dense, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def _program(parallel, check_vma):
    def local(x, scores, weights, experts, tables):
        return mix(x, experts, scores, weights, tables, parallel)

    mapped = jax.shard_map(
        local,
        mesh=MESH,
        in_specs=(P("ep"), P("ep"), P("ep"), P("ep"), P()),
        out_specs=Mixed(P("ep"), P(), P(), P(), P(), P()),
        check_vma=check_vma,
    )

    def loss(x, scores, weights, experts, tables):
        y, *counted = mapped(x, scores, weights, experts, tables)
        return (y * OUT).sum(), (y, counted)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def _check(parallel, experts, tables, check_vma=False, limit=None):
    run = _program(parallel, check_vma)
    grads, (y, (counts, overflow, device_rows, fetched, moved)) = run(
        X, SCORES, WEIGHTS, experts, tables
    )
    want_grads, want = _reference()(X, SCORES, WEIGHTS, experts)
    for got, wanted in ((y, want), *zip(grads, want_grads, strict=True)):
        check_close(got, wanted)
    assert overflow == 0
    assert 0 <= fetched <= parallel.num_fetched * DEVICES
    assert 0 <= moved <= device_rows.sum()
    known = np.where((experts >= 0) & (experts < EXPERTS), experts, -1)
    chosen = [set(row) - {-1} for row in known.tolist()]
    by_expert = np.bincount([e for row in chosen for e in row], minlength=EXPERTS)
    if tables is not None:
        counts = tables.add_replicas(counts)
    np.testing.assert_array_equal(counts, by_expert)
    assert device_rows.max() == -(-by_expert.sum() // DEVICES)


@pytest.mark.slow
def test_with_a_placement():
    parallel = ExpertParallel(
        "ep", DEVICES, num_nodes=2, balance="exact", num_fetched=6
    )
    for seed, experts in enumerate(_choices().values()):
        _check(parallel, experts, placement(seed), check_vma=True)
    assert _program(parallel, True)._cache_size() == 1


@pytest.mark.slow
def test_shared_rows_of_a_layer():
    """The module's shared expert, planned, against every expert on every token."""
    parallel = ExpertParallel(
        "ep", DEVICES, balance="exact", num_fetched=6, spread_shared=True
    )
    options = {"route_norm": False}  # the router's own gradient, not that of ties
    model, want = (moe_cases.layer(each, **options) for each in (parallel, None))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    specs = moe_cases.specs(params)

    def local(params, x, is_padding):
        y, stats = nnx.merge(graph, params, rest)(x, is_padding=is_padding)
        return y, (stats.device_rows, stats.num_fetched, stats.overflow)

    mapped = jax.shard_map(
        local,
        mesh=MESH,
        in_specs=(specs, P("ep"), P("ep")),
        out_specs=(P("ep"), P()),
    )

    def loss(params, x, is_padding):
        y, counted = mapped(params, x, is_padding)
        return (y * OUT).sum(), (y, counted)

    def dense(params, x, is_padding):
        graph, _, rest = nnx.split(want, nnx.Param, ...)
        x = jnp.where(is_padding[:, None], 0, x)
        y = moe_cases.dense(nnx.merge(graph, params, rest), x)
        y = jnp.where(is_padding[:, None], 0, y)
        return (y * OUT).sum(), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    # The last two devices have padding only.
    is_padding = jnp.arange(TOKENS) >= 3 * TOKENS // 4
    grads, (y, (device_rows, fetched, overflow)) = run(params, X, is_padding)
    want_grads, want_y = jax.jit(jax.grad(dense, argnums=(0, 1), has_aux=True))(
        params, X, is_padding
    )
    check_close(y, want_y)
    jax.tree.map(check_close, grads, want_grads)
    rows = (3 * TOKENS // 4) * (K + 1)
    assert device_rows.sum() == rows and device_rows.max() == -(-rows // DEVICES)
    assert overflow == 0 and fetched <= 6 * DEVICES


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_fetched": True, "apply_scores": "after"},
        {"route": "by_node", "num_nodes": 2, "remat": True},
    ],
    ids=str,
)
@pytest.mark.slow
def test_other_settings(changes):
    parallel = ExpertParallel("ep", DEVICES, balance="exact", num_fetched=6, **changes)
    choices = _choices()
    for name in list(choices)[:2]:
        _check(parallel, choices[name], None)


def test_gradients_are_added_in_float32_at_home():
    """Device 0 has one expert that all others fetch; 256 + 1 is 256 in bfloat16."""
    source = jnp.array([[-1]] + [[0]] * (DEVICES - 1))

    def local(weight):
        fetch = plan_fetch(source, 1, "ep")

        def total(weight):
            slots = add_fetched(
                weight, fetch, dtype=jnp.bfloat16, axis_name="ep", transport="auto"
            )
            scale = jnp.array([256, 1], jnp.bfloat16)
            return (slots * scale[:, None]).sum(dtype=jnp.float32), slots

        return jax.grad(total, has_aux=True)(weight)

    mapped = jax.shard_map(
        local, mesh=MESH, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
    )
    weight = jnp.arange(DEVICES, dtype=jnp.float32)[:, None] + 3
    grads, slots = jax.jit(mapped)(weight)
    fetched = slots.reshape(DEVICES, 2)[:, 1]
    assert fetched.tolist() == [0] + [3] * (DEVICES - 1)
    assert slots.dtype == jnp.bfloat16 and grads.dtype == jnp.float32
    assert grads.ravel().tolist() == [256.0 + DEVICES - 1] + [256.0] * (DEVICES - 1)


@pytest.mark.parametrize("most", [1, DEVICES - 1])
def test_gradients_come_home_in_rounds(most):
    """On GPUs: four experts, of which so many devices have fetched the first."""
    rng = np.random.default_rng(most)
    source = np.full((DEVICES, 2), -1)
    source[1 : 1 + most, 0] = 0
    source[:4, 1] = 2, 1, 1, 5
    own = rng.integers(-9, 9, (2 * DEVICES, 3)).astype(np.float32)
    fetched = rng.integers(-9, 9, (2 * DEVICES, 3)).astype(np.float32)

    def local(own, fetched):
        gather = plan_fetch(jnp.asarray(source), 2, "ep").gather
        fetched = fetched[jnp.argsort(gather.received)]
        way = {"axis_name": "ep", "transport": "gather"}
        return [
            add(own, fetched, gather, **way) for add in (add_at_once, add_in_rounds)
        ]

    mapped = jax.shard_map(
        local, mesh=MESH, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
    )
    want = own.copy()
    np.add.at(want, source[source >= 0], fetched[source.reshape(-1) >= 0])
    for got in jax.jit(mapped)(own, fetched):
        np.testing.assert_array_equal(got, want)


def test_a_fetch_is_one_exchange_of_all_slots():
    source = jnp.array([[-1, -1]] + [[0, 1]] * (DEVICES - 1))

    def local(weight):
        fetch = plan_fetch(source, 2, "ep")
        return add_fetched(
            weight, fetch, dtype=jnp.bfloat16, axis_name="ep", transport="ragged"
        )

    mapped = jax.shard_map(
        local, mesh=MESH, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
    )
    text = jax.jit(mapped).lower(jnp.ones((2 * DEVICES, 3))).as_text()
    assert text.count("@ragged_all_to_all(") == 1
    assert "all_gather" not in text and "while" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "even"}, "balance='even' must be one of"),
        ({"num_fetched": 2}, "num_fetched=2 needs balance='exact'"),
        ({"slack": 0.1}, "slack=0.1 needs balance='exact'"),
        ({"balance": "exact", "num_fetched": -1}, "num_fetched=-1 must be at least 0"),
        ({"balance": "exact", "slack": -1.0}, "slack=-1.0 must be at least 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertParallel(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_rows": 17},
            "num_rows=17 contradicts balance='exact', by which each dev",
        ),
        ({"num_fetched": 17}, "num_fetched=17 must be at least 0 and at most the 16"),
    ],
)
def test_bad_settings_for_a_call(options, message):
    parallel = ExpertParallel("ep", DEVICES, balance="exact", **options)
    experts = jnp.zeros((TOKENS, K), jnp.int32)

    def local(x, scores, weights, experts):
        return mix_experts(x, experts, scores, weights, None, parallel)

    mapped = jax.shard_map(
        local, mesh=MESH, in_specs=P("ep"), out_specs=(P("ep"), P(), P())
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mapped, X, SCORES, WEIGHTS, experts)


def test_one_device_has_nothing_to_even_out():
    parallel = ExpertParallel(balance="exact", num_fetched=2)
    tables = ExpertTables.in_order(EXPERTS)
    experts = jnp.asarray(_choices()["even"])
    y = mix(X, experts, SCORES, WEIGHTS, tables, parallel)
    want = _dense(X, SCORES, WEIGHTS, experts)[1]
    check_close(y.outputs, want)
    assert y.device_rows.tolist() == [TOKENS * K]
