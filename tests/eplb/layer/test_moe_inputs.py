"""The layer at the limits of its inputs: padding, unknown and repeated ids, nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from eplb_jax.layer.mixture import ExpertWeights, mix_experts
from eplb_jax.layer.parallel import ONE_DEVICE, ExpertParallel
from eplb_jax.placement.tables import ExpertTables
from tests.eplb.layer.moe_cases import (
    DEVICES,
    DIM,
    EXPERTS,
    MESH,
    OUT,
    TOKENS,
    X,
    check_close,
    layer,
    placement,
    specs,
)


@pytest.mark.slow
def test_what_does_not_fit_is_counted_and_counts_as_zero():
    # All tokens choose expert 5, on device 2.
    num_rows = 7
    experts = np.full((TOKENS, 1), 5)
    weights = ExpertWeights(*(leaf[...] for leaf in layer().experts))
    parallel = ExpertParallel("ep", DEVICES, num_rows=num_rows)

    def run(x, experts, weights):
        return mix_experts(x, experts, jnp.ones((len(x), 1)), weights, None, parallel)

    run = jax.shard_map(
        run,
        mesh=MESH,
        in_specs=(P("ep"), P("ep"), P("ep")),
        out_specs=(P("ep"), P(), P()),
        check_vma=False,
    )
    y, counts, overflow = jax.jit(run)(X, jnp.asarray(experts), weights)
    assert overflow == TOKENS - num_rows
    assert counts.tolist() == [0] * 5 + [TOKENS] + [0] * 10
    served = np.asarray(y).any(axis=1)
    assert served.sum() == num_rows
    assert served[:num_rows].all()  # devices are served in order
    one, _, _ = jax.jit(mix_experts)(
        X, jnp.asarray(experts), jnp.ones((TOKENS, 1)), weights
    )
    np.testing.assert_allclose(y[:num_rows], one[:num_rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "tables"),
    [
        ({}, None),
        ({"replica_choice": "balanced", "apply_scores": "after"}, placement(6)),
        ({"num_nodes": 2, "route": "by_node"}, placement(6)),
    ],
    ids=["direct", "balanced", "by node"],
)
def test_repeated_and_unknown_ids_never_overflow_the_default_buffers(changes, tables):
    """Each token chooses one expert four times, of at most three on a device."""
    # One with a single replica, so that all rows go to one device.
    expert = 5 if tables is None else int(np.argmin(tables.expert_count))
    experts = np.full((TOKENS, 4), expert)
    experts[::3] = [EXPERTS, 7, -2, 7]
    weights = np.random.default_rng(2).random(experts.shape).astype(np.float32)
    weights[::3, ::2] = np.nan  # of no expert
    parallel = ExpertParallel("ep", DEVICES, **changes)
    held = ExpertWeights(*(leaf[...] for leaf in layer().experts))

    def run(x, experts, weights, held):
        return mix_experts(x, experts, weights, held, tables, parallel)

    run = jax.shard_map(
        run,
        mesh=MESH,
        in_specs=P("ep"),
        out_specs=(P("ep"), P(), P()),
        check_vma=False,
    )
    y, counts, overflow = jax.jit(run)(X, experts, weights, held)
    assert overflow == 0
    # Equal choices are one row.
    by_expert = counts if tables is None else tables.add_replicas(counts)
    want = np.zeros(EXPERTS, int)
    np.add.at(want, [expert, 7], [TOKENS * 2 // 3, TOKENS // 3])
    np.testing.assert_array_equal(by_expert, want)
    gate, up, down = (np.asarray(leaf, np.float64) for leaf in held)
    want = np.zeros((TOKENS, DIM))
    for token, choice in np.ndindex(experts.shape):
        e = experts[token, choice]
        if 0 <= e < EXPERTS:
            x = np.asarray(X[token], np.float64)
            inside = x @ gate[e] / (1 + np.exp(-x @ gate[e])) * (x @ up[e])
            want[token] += weights[token, choice] * (inside @ down[e])
    check_close(y, want)


@pytest.mark.parametrize("devices", [1, DEVICES])
@pytest.mark.parametrize("shape", [(0, DIM), (0, 5, DIM), (3, 0, DIM)], ids=str)
def test_batches_without_tokens(shape, devices):
    parallel = ONE_DEVICE
    if devices > 1:
        parallel = ExpertParallel("ep", DEVICES, replica_choice="balanced")
    graph, params, rest = nnx.split(layer(parallel), nnx.Param, ...)
    tables = placement(0)

    def run(params, x):
        y, stats = nnx.merge(graph, params, rest)(x, tables)
        if devices > 1:
            loss = jax.lax.pmean(stats.balance_loss, "ep")
            stats = stats._replace(balance_loss=loss)
        return y, stats

    if devices > 1:
        over = P(*("ep" if size == 0 else None for size in shape))
        run = jax.shard_map(
            run, mesh=MESH, in_specs=(specs(params), over), out_specs=(over, P())
        )

    def loss(params, x):
        y, stats = run(params, x)
        return y.sum() + stats.balance_loss, (y, stats)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    grads, (y, stats) = grad(params, jnp.zeros(shape))
    assert y.shape == grads[1].shape == shape
    for leaf in (*jax.tree.leaves(grads), *stats):
        assert not leaf.any()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, DEVICES])
def test_padding_reaches_nothing(devices):
    parallel = ExpertParallel("ep", DEVICES) if devices > 1 else ExpertParallel()
    model = layer(parallel, num_shared=0)
    is_padding = np.arange(TOKENS) % 5 == 0
    x = jnp.where(is_padding[:, None], jnp.nan, X)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tables = placement(6)

    def run(params, x, is_padding):
        y, _ = nnx.merge(graph, params, rest)(x, tables, is_padding=is_padding)
        return y

    if devices > 1:
        run = jax.shard_map(
            run,
            mesh=MESH,
            in_specs=(specs(params), P("ep"), P("ep")),
            out_specs=P("ep"),
            check_vma=False,
        )

    def loss(params, x):
        y = run(params, x, jnp.asarray(is_padding))
        return (y * OUT).sum(), y

    grad = jax.jit(jax.grad(loss, has_aux=True))
    grads, y = grad(params, x)
    assert not np.asarray(y)[is_padding].any()
    want, _ = grad(params, jnp.nan_to_num(x))
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert np.asarray(theirs).any()
        np.testing.assert_array_equal(ours, theirs)


def test_bad_arguments():
    model = layer()
    tables = placement(0)
    for call, message in [
        (
            lambda: layer(top_k=17, num_groups=1, topk_groups=1),
            "top_k=17 must be between 1",
        ),
        (lambda: layer(num_groups=5), "num_groups=5 must divide"),
        (lambda: layer(router="best"), "router='best' must be 'sigmoid' or 'softmax'"),
        (lambda: layer(router="softmax", num_groups=5), "num_groups=5 must divide"),
        (
            lambda: layer(ExpertParallel("ep", 5)),
            "parallel.num_devices=5 must divide num_experts=16",
        ),
        (
            lambda: model(X, ExpertTables.from_placement(jnp.arange(9), 9)),
            "tables are for 9 experts, but the layer has 16",
        ),
        (lambda: model(X, physical=model.experts), "need the tables"),
        (
            lambda: model(
                X,
                tables,
                physical=ExpertWeights(*(leaf[...] for leaf in model.experts)),
            ),
            "weights of 16 physical experts per device do not fit tables of 24",
        ),
        (
            lambda: layer(ExpertParallel("ep", 8))(X, placement(0, 25)),
            "num_devices=8 must divide the 25 physical experts",
        ),
        (
            lambda: ExpertParallel(apply_scores="never"),
            "apply_scores='never' must be one of before, after",
        ),
        (
            lambda: ExpertParallel(route="by_air"),
            "route='by_air' must be one of direct, by_node",
        ),
        (
            lambda: ExpertTables.from_placement(jnp.zeros(16, int), 16),
            "Expert 1 of layer 0 has no replica",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
