"""Functions to split: from a matrix product to a Flax module under scan and remat."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

D, BATCH, LAYERS = 8, 4, 3


def normal(seed, *shape, dtype=jnp.float32):
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])
    return jnp.asarray(values, dtype)


def weights(num, *, stacked=False):
    made = [normal(seed, D, D) for seed in range(num)]
    return jnp.stack(made) if stacked else made


X = normal(100, BATCH, D) * np.sqrt(D).astype(np.float32)


def tanh_layer(w, x):
    return jnp.tanh(x @ w)


def gelu_block(w, x):
    return x + jax.nn.gelu(x @ w) @ w.T


def mlp(ws, x):
    for w in ws:
        x = jax.nn.gelu(x @ w)
    return x


def mlp_remat_each(ws, x):
    for w in ws:
        x = jax.checkpoint(lambda w, x: jax.nn.gelu(x @ w))(w, x)
    return x


def attention(p, x):
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def layers(block):
    def run(ws, x):
        return lax.scan(lambda x, w: (block(w, x), None), x, ws)[0]

    return run


def shared_weight_scan(w, x):
    return lax.scan(lambda x, _: (tanh_layer(w, x), None), x, None, length=LAYERS)[0]


def bf16_block(w, x):
    h = jax.nn.gelu(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))
    return x + (h @ w.T.astype(jnp.bfloat16)).astype(jnp.float32)


@jax.custom_vjp
def linear(w, x):
    return x @ w


def linear_backward(saved, ct):
    w, x = saved
    return x.T @ ct, ct @ w.T  # both cotangents from one call


linear.defvjp(lambda w, x: (x @ w, (w, x)), jax.jit(linear_backward))


@jax.custom_vjp
def flash(q, k, v):
    return jax.nn.softmax(q @ k.T) @ v


def flash_backward(saved, ct):
    q, k, v = saved
    p = jax.nn.softmax(q @ k.T)  # recomputed, as flash attention does
    dp = ct @ v.T
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    return ds @ k, ds.T @ q, p.T @ ct


flash.defvjp(lambda q, k, v: (flash(q, k, v), (q, k, v)), flash_backward)


def flash_attention(p, x):
    return flash(x @ p["q"], x @ p["k"], x @ p["v"]) @ p["o"]


def dropout(ws, x, key):
    for i, w in enumerate(ws):
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.9, x.shape)
        x = jnp.where(keep, jnp.tanh(x @ w), 0.0)
    return x


def branch(ws, x, index):
    branches = [
        lambda x: jnp.tanh(x @ ws[0]),
        lambda x: jax.nn.gelu(x @ ws[1]) @ ws[2],
        lambda x: x,
    ]
    return lax.switch(index, branches, x)


def branching_layer(ws, x):
    def narrow(x):
        return jnp.sin(x @ ws[0]) @ ws[0]

    return lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ ws[1]), narrow, x)


def halve_until_small(w, x):
    def loop(s):
        return lax.while_loop(lambda s: s > 1.0, lambda s: s / 2, s)

    return tanh_layer(w, x) * lax.stop_gradient(loop(jnp.sum(x * x)))


class Block(nnx.Module):
    """A pre-norm transformer block, with its parameters in float32."""

    def __init__(self, dtype, rngs):
        kw = {"dtype": dtype, "param_dtype": jnp.float32, "rngs": rngs}
        self.norm1, self.norm2 = nnx.LayerNorm(D, **kw), nnx.LayerNorm(D, **kw)
        self.attention = nnx.MultiHeadAttention(2, D, decode=False, **kw)
        self.up, self.down = nnx.Linear(D, 4 * D, **kw), nnx.Linear(4 * D, D, **kw)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class FeedForward(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(self.norm(x))))


class Scanned(nnx.Module):
    """Layers under nnx.scan, each optionally under nnx.remat."""

    def __init__(self, remat, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return FeedForward(rngs)

        self.layers, self.remat = make(rngs), remat

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            call = nnx.remat(lambda f, x: f(x)) if self.remat else lambda f, x: f(x)
            return call(layer, x)

        return run(self.layers, x)


class TiedEmbedding(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.linear = (
            nnx.Embed(16, D, rngs=rngs),
            nnx.Linear(D, D, rngs=rngs),
        )

    def __call__(self, tokens):
        return self.embed.attend(nnx.relu(self.linear(self.embed(tokens))))


def module(model, *inputs):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return (lambda p, *xs: nnx.merge(graph, p, rest)(*xs)), params, *inputs


def sharded(check_vma):
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    inner = jax.shard_map(
        lambda w, x: lax.psum(jnp.tanh(x @ w), "a") @ w.T,
        mesh=mesh,
        in_specs=(P("a", None), P(None, "a")),
        out_specs=P(None, "a"),
        check_vma=check_vma,
    )
    return lambda ws, x: inner(ws[0], jnp.sin(x)) @ ws[1]


Q, K, V, O = weights(4)
ATTENTION = {"q": Q, "k": K, "v": V, "o": O}
STACK = weights(LAYERS, stacked=True)
TABLE = normal(9, 16, D)
TOKENS = jnp.array([3, 1, 3, 5])
X3 = normal(101, 2, 6, D)
KEY = jax.random.key(7)

# name: (function, params, inputs..., matrix products of F, I and W).
CASES = {
    "mlp": (mlp, weights(4), X, (4, 4, 4)),
    "jit": (jax.jit(mlp), weights(4), X, (4, 4, 4)),
    "remat each": (mlp_remat_each, weights(4), X, (4, 8, 4)),
    "remat whole": (jax.checkpoint(mlp), weights(4), X, (4, 8, 4)),
    "attention": (attention, ATTENTION, X, (6, 8, 4)),
    "tied": (lambda w, x: tanh_layer(w, tanh_layer(w, x)), Q, X, (2, 2, 2)),
    "scan": (layers(tanh_layer), STACK, X, (1, 1, 1)),
    "scan of blocks": (layers(gelu_block), STACK, X, (2, 2, 2)),
    "scan, remat each": (layers(jax.checkpoint(gelu_block)), STACK, X, (2, 3, 2)),
    "scan, remat whole": (jax.checkpoint(layers(gelu_block)), STACK, X, (2, 4, 2)),
    "scan in bf16": (layers(bf16_block), STACK, X, (2, 2, 2)),
    "scan, shared weight": (shared_weight_scan, Q, X, (1, 1, 1)),
    "nested scan": (layers(shared_weight_scan), STACK, X, (1, 1, 1)),
    "nested, remat": (layers(jax.checkpoint(shared_weight_scan)), STACK, X, (1, 2, 1)),
    "custom_vjp": (lambda p, x: linear(p[1], linear(p[0], x)), (Q, K), X, (2, 2, 2)),
    "flash": (flash_attention, ATTENTION, X, (6, 9, 4)),
    "dropout": (dropout, weights(2), X, KEY, (2, 2, 2)),
    "dropout, remat": (jax.checkpoint(dropout), weights(2), X, KEY, (2, 4, 2)),
    "switch": (branch, weights(3), X, jnp.int32(1), (3, 3, 3)),
    "scan of conds": (layers(branching_layer), (STACK, STACK[::-1]), X, (3, 3, 3)),
    "scan of conds, remat": (
        layers(jax.checkpoint(branching_layer)),
        (STACK, STACK[::-1]),
        X,
        (3, 5, 3),
    ),
    "while": (halve_until_small, Q, X, (1, 1, 1)),
    "embedding": (
        lambda p, t: p[0][t] @ p[1],
        (normal(9, 16, D), Q),
        TOKENS,
        (1, 0, 2),
    ),
    "unused": (lambda p, x, y: tanh_layer(p[0], x), (Q, K), X, X, (1, 1, 1)),
    "nnx f32": (*module(Block(jnp.float32, nnx.Rngs(0)), X3), (8, 10, 6)),
    "nnx bf16": (*module(Block(jnp.bfloat16, nnx.Rngs(0)), X3), (8, 10, 6)),
    "nnx.scan": (*module(Scanned(False, nnx.Rngs(0)), X), (2, 2, 2)),
    "nnx.scan, nnx.remat": (*module(Scanned(True, nnx.Rngs(0)), X), (2, 3, 2)),
    "nnx tied": (*module(TiedEmbedding(nnx.Rngs(0)), TOKENS), (2, 0, 4)),
    "shard_map": (sharded(True), (Q, K), X, (3, 3, 3)),
    "shard_map, unchecked": (sharded(False), (Q, K), X, (3, 3, 3)),
}
