"""A small layer, its tables and programs, and every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P

from eplb_jax.layer.moe import MoE
from eplb_jax.layer.parallel import ExpertParallel
from eplb_jax.placement.tables import ExpertTables

DIM, HIDDEN, EXPERTS, K, PHYSICAL, DEVICES, TOKENS = 8, 12, 16, 3, 24, 8, 48


MESH = jax.make_mesh((DEVICES,), ("ep",), axis_types=(AxisType.Auto,))


_RNG = np.random.default_rng(0)
X = jnp.asarray(_RNG.standard_normal((TOKENS, DIM)), jnp.float32)
OUT = jnp.asarray(_RNG.standard_normal((TOKENS, DIM)), jnp.float32)


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


def with_gradients(fn, params, out=OUT):
    def loss(params, x, tables):
        y, stats = fn(params, tables, x)
        return (y * out).sum(), (y, stats)

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
