"""The layer against every expert on every token, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P

from dualpipe_jax.backward.split_backward import SplitBackward
from eplb_jax.layer.mixture import ExpertWeights, mix_experts
from eplb_jax.layer.moe import MoE
from eplb_jax.layer.parallel import ONE_DEVICE, ExpertParallel
from eplb_jax.layer.physical import physical_weights
from eplb_jax.layer.routing import sequence_balance_loss
from eplb_jax.placement.tables import ExpertTables

DIM, HIDDEN, EXPERTS, K, PHYSICAL, DEVICES, TOKENS = 8, 12, 16, 3, 24, 8, 48
MESH = jax.make_mesh((DEVICES,), ("ep",), axis_types=(AxisType.Auto,))
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((TOKENS, DIM)), jnp.float32)
OUT = jnp.asarray(RNG.standard_normal((TOKENS, DIM)), jnp.float32)


@functools.cache
def layer(parallel=None, **changes):
    parallel = parallel or ExpertParallel()
    sizes = {"num_experts": EXPERTS, "top_k": K, "num_shared": 1, "route_scale": 2.5}
    sizes |= {"num_groups": 4, "topk_groups": 2, "parallel": parallel} | changes
    return MoE(DIM, HIDDEN, **sizes, rngs=nnx.Rngs(0))


def placement(seed, num_physical=PHYSICAL):
    """The tables of any placement in which each expert has a replica."""
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, EXPERTS, num_physical - EXPERTS)
    expert_of = rng.permutation(np.concatenate([np.arange(EXPERTS), extra]))
    return ExpertTables.from_placement(expert_of, EXPERTS)


def dense(model, x):
    """Every expert on every token; experts that were not chosen have weight 0."""
    routing = model.route(x)
    chosen = jax.nn.one_hot(routing.experts, EXPERTS) * routing.weights[..., None]
    gate, up, down = (leaf[...] for leaf in model.experts)
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate))
    hidden = hidden * jnp.einsum("td,edf->tef", x, up)
    y = jnp.einsum("tef,efd,te->td", hidden, down, chosen.sum(axis=1))
    if model.shared is not None:
        gate, up, down = (leaf[0] for leaf in model.shared)
        y += (jax.nn.silu(x @ gate) * (x @ up)) @ down
    return y


def specs(params):
    """The experts' first axis is divided, all else replicated."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P("ep") if "experts" in jax.tree_util.keystr(path) else P(),
        params,
    )


def on_one(tables, graph, params, rest, x):
    return nnx.merge(graph, params, rest)(x, tables)


def on_eight(tables, graph, params, rest, x, *, check_vma=False):
    def run(params, rest, tables, x):
        y, stats = nnx.merge(graph, params, rest)(x, tables)
        loss = jax.lax.pmean(stats.balance_loss, "ep")
        return y, stats._replace(balance_loss=loss)

    sharded = jax.shard_map(
        run,
        mesh=MESH,
        in_specs=(specs(params), P(), P(), P("ep")),
        out_specs=(P("ep"), P()),
        check_vma=check_vma,
    )
    return sharded(params, rest, tables, x)


@functools.cache
def program(parallel=None, *, check_vma=False, **changes):
    """`run(tables, x)`, compiled once: outputs and gradients, and what it counted."""
    graph, params, rest = nnx.split(layer(parallel, **changes), nnx.Param, ...)
    run = functools.partial(on_eight, check_vma=check_vma) if parallel else on_one
    return with_gradients(
        lambda params, tables, x: run(tables, graph, params, rest, x), params
    )


def with_gradients(fn, params):
    def loss(params, x, tables):
        y, stats = fn(params, tables, x)
        return (y * OUT).sum(), (y, stats)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def run(tables, x=X):
        grads, (y, stats) = grad(params, x, tables)
        return (y, grads), stats

    run.cache_size = grad._cache_size
    return run


@functools.cache
def reference(**changes):
    graph, params, rest = nnx.split(layer(**changes), nnx.Param, ...)

    def fn(params, tables, x):
        return dense(nnx.merge(graph, params, rest), x), None

    return with_gradients(fn, params)(None)[0]


# Other routes and settings are compared with it: shared, so that it is compiled once.
SPREAD = functools.partial(
    program, ExpertParallel("ep", DEVICES, num_nodes=2), check_vma=True
)


def check_close(got, want):
    """Relative to each array's norm: float32 sums in another order."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(np.asarray(ours) - np.asarray(theirs))
        assert error <= 1e-5 * np.linalg.norm(theirs)


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
    weights = RNG.random(experts.shape).astype(np.float32)
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


@pytest.mark.slow
def test_fp8_payload():
    dim = 256
    x = jnp.asarray(RNG.standard_normal((16, dim)), jnp.float32).at[3].set(0.0)
    experts = jnp.asarray(RNG.integers(0, 8, (16, 2)), jnp.int32)
    gate, up = (
        jnp.asarray(RNG.standard_normal((8, dim, 16)) / 16, jnp.float32) for _ in "ab"
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
        (lambda: layer(router="softmax"), "num_groups=4 belongs to router='sigmoid'"),
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
            "apply_scores='never' must be 'before' or 'after'",
        ),
        (
            lambda: ExpertParallel(route="by_air"),
            "route='by_air' must be 'direct' or 'by_node'",
        ),
        (
            lambda: ExpertTables.from_placement(jnp.zeros(16, int), 16),
            "Expert 1 of layer 0 has no replica",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
