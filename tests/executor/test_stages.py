"""What stages may do (docs/stages.md): each against the same model without a pipeline.

The stages of a model differ, so that one compiled program verifies several things. Each
stage has the parameters of all, and reads its own.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from dualpipe_jax import (
    PipelineParams,
    dualpipev,
    pipeline_value_and_grad,
    stack_stages,
)
from tests.executor.toy import assert_grads_close, make_mesh

pytestmark = pytest.mark.slow  # two programs with four functions each

SCHEDULE = dualpipev(2, 4)
MICROBATCH, LENGTH, WIDTH, DEVICES = 2, 4, 4, 2
X = jax.random.normal(jax.random.key(1), (4, MICROBATCH, LENGTH, WIDTH))


def loss_fn(head, y, targets):
    return jnp.mean((y - targets) ** 2)


def reference(stage_fns, params, x):
    """Returns the mean loss of the same stages, one after the other."""

    def loss(x, target):
        y = x
        for s, stage_fn in enumerate(stage_fns):
            y = stage_fn(jax.tree.map(lambda leaf, s=s: leaf[s], params), y)
        return loss_fn(None, y, target)

    return jax.vmap(loss)(x, jnp.sin(x)).mean()


def assert_stage_is_right(results, stage):
    grads, expected = (jax.tree.map(lambda g: g[stage], tree) for tree in results)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(expected))
    assert_grads_close(grads, expected)


# Stages over an axis of the mesh: sequences are divided over `sp`, and so are the
# matrices of an MLP.


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def attention(params, x):
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
    return jax.nn.softmax(q @ k.mT) @ v


def tensor_parallel(params, x):
    """Every device has all tokens, and a part of the hidden units."""
    tokens = lax.all_gather(x, "sp", axis=1, tiled=True)
    y = lax.psum(mlp(params, tokens), "sp")
    here = lax.axis_index("sp") * x.shape[1]
    return x + lax.dynamic_slice_in_dim(y, here, x.shape[1], axis=1)


def sequence_parallel(params, x):
    """The same, but each device sums only its own tokens."""
    tokens = lax.all_gather(x, "sp", axis=1, tiled=True)
    y = mlp(params, tokens)
    return x + lax.psum_scatter(y, "sp", scatter_dimension=1, tiled=True)


def ring_attention(params, x):
    """Keys and values go around, and the softmax is kept up to date."""
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
    ring = [(d, (d + 1) % DEVICES) for d in range(DEVICES)]

    def turn(carry, _):
        k, v, largest, weight, total = carry
        logits = q @ k.mT
        new = jnp.maximum(largest, logits.max(-1, keepdims=True))
        now, before = jnp.exp(logits - new), jnp.exp(largest - new)
        weight = weight * before + now.sum(-1, keepdims=True)
        total = total * before + now @ v
        k, v = lax.ppermute((k, v), "sp", ring)
        return (k, v, new, weight, total), None

    least = jnp.full((*q.shape[:-1], 1), -1e30)
    start = k, v, least, jnp.zeros_like(least), jnp.zeros_like(v)
    (*_, weight, total), _ = lax.scan(turn, start, length=DEVICES)
    return x + total / weight


def all_to_all_attention(params, x):
    """Every device has all tokens of a part of the microbatch."""
    rows = lax.all_to_all(x, "sp", 0, 1, tiled=True)
    y = attention(params, rows)
    return x + lax.all_to_all(y, "sp", 1, 0, tiled=True)


SHARDED = {
    "psum": tensor_parallel,
    "psum_scatter": sequence_parallel,
    "ring attention": ring_attention,
    "all_to_all": all_to_all_attention,
}


@functools.cache
def sharded_results():
    def normal(seed, *shape):
        return 0.5 * jax.random.normal(jax.random.key(seed), (4, *shape))

    params = {
        "up": normal(2, WIDTH, 2 * WIDTH),
        "down": normal(3, 2 * WIDTH, WIDTH),
        "qkv": normal(4, WIDTH, 3 * WIDTH),
    }

    def own_tokens(embed, x):
        here = lax.axis_index("sp") * (LENGTH // DEVICES)
        return lax.dynamic_slice_in_dim(x, here, LENGTH // DEVICES, axis=1)

    step = pipeline_value_and_grad(
        list(SHARDED.values()),
        lambda head, y, targets: loss_fn(head, y, own_tokens(None, targets)),
        schedule=SCHEDULE,
        mesh=make_mesh(pp=2, sp=DEVICES),
        embed_fn=own_tokens,
        param_specs=PipelineParams({"up": P(None, "sp"), "down": P("sp"), "qkv": P()}),
    )
    _, grads = step(PipelineParams(params), X, jnp.sin(X))
    plain = [mlp, mlp, attention, attention]
    fns = [lambda p, x, fn=fn: x + fn(p, x) for fn in plain]
    expected = jax.jit(jax.grad(functools.partial(reference, fns)))(params, X)
    return grads.stages, expected


@pytest.mark.parametrize("name", SHARDED)
def test_collectives_over_another_axis(name):
    assert_stage_is_right(sharded_results(), list(SHARDED).index(name))


# Stages that are modules, or have rules of their own.


class Quantized(nnx.Variable):
    """Parameters that are never trained."""


class Normed(nnx.Module):
    """Batch statistics of each microbatch; running ones go out as aux."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return x + jnp.sin(self.norm(x))


class Layers(nnx.Module):
    """A scan over layers, each recomputed in the backward."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.layers = make(rngs.split(3))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return x + jnp.tanh(layer(x))

        return run(x, self.layers)


class Adapted(nnx.Module):
    """An adapter beside a matrix of int8."""

    def __init__(self, rngs):
        w = jax.random.normal(rngs.params(), (WIDTH, WIDTH))
        scale = jnp.abs(w).max(0) / 127
        self.scale = Quantized(scale)
        self.base = Quantized(jnp.round(w / scale[None]).astype(jnp.int8))
        self.lora = nnx.LoRA(WIDTH, 1, WIDTH, rngs=rngs)
        self.lora.lora_b[...] = jax.random.normal(rngs.params(), (1, WIDTH))

    def __call__(self, x):
        w = self.base[...].astype(x.dtype) * self.scale[...][None]
        return x + jnp.tanh(x @ w + self.lora(x))


class Scale(nn.Module):
    """A Linen module, with a rule of its own for the gradient, and a callback."""

    @nn.compact
    def __call__(self, x):
        jax.debug.callback(SEEN.append, x.sum())
        scale = self.param("scale", nn.initializers.ones, (WIDTH,))
        return clipped(x) * scale[None, None]


SEEN = []


@jax.custom_vjp
def clipped(x):
    return jnp.sin(x)


clipped.defvjp(
    lambda x: (jnp.sin(x), x),
    lambda x, ct: (jnp.clip(ct * jnp.cos(x), -0.01, 0.01),),
)

MODULES = {"BatchNorm": Normed, "scan and remat": Layers, "LoRA and int8": Adapted}
GRAPHDEFS = {name: nnx.graphdef(make(nnx.Rngs(0))) for name, make in MODULES.items()}


def module_stage(name):
    def stage(params, x):
        if name == "Linen":
            return Scale().apply({"params": params[name]}, x), no_stats(params)
        module = nnx.merge(GRAPHDEFS[name], params[name])
        y = module(x)
        if name != "BatchNorm":
            return y, no_stats(params)
        return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return stage


def no_stats(params):
    stats = nnx.filter_state(params["BatchNorm"], nnx.BatchStat)
    return jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(stats))


@functools.cache
def module_results():
    def make_stage(seed):
        params = {name: nnx.state(m(nnx.Rngs(seed))) for name, m in MODULES.items()}
        linen = Scale().init(jax.random.key(seed), X[0])["params"]
        return {**params, "Linen": linen}

    params = stack_stages([make_stage(seed) for seed in range(4)])
    names = [*MODULES, "Linen"]
    is_trained = nnx.Not((nnx.BatchStat, Quantized))
    step = pipeline_value_and_grad(
        [module_stage(name) for name in names],
        loss_fn,
        schedule=SCHEDULE,
        mesh=make_mesh(pp=2),
        trainable=is_trained,
        aux_reduction="stack",
    )
    SEEN.clear()
    (_, stats), grads = step(PipelineParams(params), X, jnp.sin(X))
    jax.effects_barrier()
    seen = sorted(map(float, SEEN))
    trained, frozen = PipelineParams(params).partition(is_trained)
    stages = [module_stage(name) for name in names]

    def loss(trained):
        fns = [lambda p, x, fn=fn: fn(p, x)[0] for fn in stages]
        return reference(fns, trained.combine(frozen).stages, X)

    return (grads.stages, jax.jit(jax.grad(loss))(trained).stages), stats, seen


@pytest.mark.parametrize("name", [*MODULES, "Linen"])
def test_modules(name):
    results, _, _ = module_results()
    assert_stage_is_right(results, [*MODULES, "Linen"].index(name))


def test_running_statistics_go_out_as_aux():
    _, stats, _ = module_results()
    means = stats["norm"]["mean"][0]  # of the first stage, one row for each microbatch
    np.testing.assert_allclose(means, 0.5 * X.mean((1, 2)), atol=1e-6)  # f32 sums


def test_callbacks_run_once_a_microbatch():
    _, _, seen = module_results()
    assert len(seen) == SCHEDULE.num_microbatches == len(set(seen))
