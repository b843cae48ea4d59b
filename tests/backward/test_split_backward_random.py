"""Splits random programs of nested loops, branches and remats, and compares.

Every fault found by random programs is a named case below.
"""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from dualpipe_jax.backward import flop_count as counting
from dualpipe_jax.backward.split_backward import SplitBackward

D = 4


def stack(ws, length):
    return [jnp.stack([w * (i + 1) / length for i in range(length)]) for w in ws]


def simple(rng):
    """A layer without layers inside it."""
    i, j = rng.randrange(3), rng.randrange(3)
    return rng.choice(
        [
            lambda ws, x: x @ ws[i],
            lambda ws, x: x @ ws[i],
            lambda ws, x: jnp.tanh(x @ ws[i]) @ ws[i].T,
            lambda ws, x: jax.nn.gelu(x),
            lambda ws, x: (x - x.mean(-1, keepdims=True)) * ws[i][:1],
            lambda ws, x: x * jnp.sin(x @ ws[i]),
            lambda ws, x: x.astype(jnp.float16).astype(jnp.float32) @ ws[i],
            lambda ws, x: jax.nn.softmax((x @ ws[i]) @ (x @ ws[j]).T) @ x,
            lambda ws, x: x[jnp.argsort(x[:, 0])] @ ws[i],
        ]
    )


def nested(rng, depth):
    """A layer around one or two random programs."""
    f, g = program(rng, depth), program(rng, depth)
    length, reverse, guard = rng.randint(1, 3), rng.random() < 0.3, rng.random() < 0.5

    def remat(function):
        return jax.checkpoint(function, prevent_cse=guard)

    def scan(function, x, xs):
        return lax.scan(function, x, xs, length=length, reverse=reverse)

    def over_weights(ws, x):
        return scan(lambda x, w: (f(w, x), None), x, stack(ws, length))[0]

    def rematted(ws, x):
        return scan(remat(lambda x, w: (f(w, x), None)), x, stack(ws, length))[0]

    def with_outputs(ws, x):
        x, ys = scan(lambda c, w: (jnp.tanh(c), f(w, c)), x, stack(ws, length))
        return x + ys.sum(0)

    def mapped(ws, x):
        return lax.map(lambda row: f(ws, row), jnp.stack([x, x * 0.5])).sum(0)

    def branch(ws, x):
        return lax.cond(x[0, 0] > 0.1, lambda x: f(ws, x), lambda x: g(ws, x), x)

    def custom(ws, x):
        call = jax.custom_vjp(f)
        backward = jax.jit(lambda saved, ct: jax.vjp(f, *saved)[1](ct))
        call.defvjp(lambda ws, x: (f(ws, x), (ws, x)), backward)
        return call(ws, x)

    return rng.choice(
        [
            over_weights,
            lambda ws, x: scan(lambda x, _: (f(ws, x), None), x, None)[0],
            lambda ws, x: scan(
                remat(lambda x, w: (f(w, x), None)), x, stack(ws, length)
            )[0],
            with_outputs,
            mapped,
            branch,
            custom,
            lambda ws, x: x + f(ws, x),
            lambda ws, x: f(ws, x) * jnp.tanh(g(ws, x)),
            lambda ws, x: remat(f)(ws, x),
            lambda ws, x: jax.jit(f)(ws, x),
        ]
    )


def program(rng, depth=0):
    """A random function of three [D, D] weights and an [n, D] input."""
    layers = [
        nested(rng, depth + 1) if depth < 2 and rng.random() < 0.6 else simple(rng)
        for _ in range(rng.randint(1, 3))
    ]

    def fn(ws, x):
        return functools.reduce(lambda x, layer: layer(ws, x), layers, x)

    return fn


def weights_and_input(seed):
    rng = np.random.default_rng(seed)
    ws = [jnp.asarray(rng.standard_normal((D, D)) / 2, jnp.float32) for _ in range(3)]
    return ws, jnp.asarray(rng.standard_normal((3, D)), jnp.float32)


def check(fn, seed, monkeypatch):
    ws, x = weights_and_input(seed)
    plan = SplitBackward.trace(fn, ws, x, early_reductions=bool(seed % 2))

    def reference(ws, x):
        y, pullback = jax.vjp(fn, ws, x)
        return y, pullback(jnp.cos(y))

    def split(ws, x):
        y, residuals = plan.forward(ws, x)
        (dx,), wgrad_residuals = plan.backward_input(ws, residuals, jnp.cos(y))
        return y, (plan.backward_weights(ws, residuals, wgrad_residuals), dx)

    got = jax.jit(split)(ws, x)
    want = jax.jit(reference)(ws, x)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float32, through up to three nested loops and rounding to float16.
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4 * np.abs(w).max() + 1e-7)
    # The costliest branch may be another in I than in W: count all of them.
    monkeypatch.setattr(counting, "max", sum, raising=False)
    programs = plan.programs
    forward = counting.flops(lambda *a: jax.tree.leaves(jax.vjp(fn, *a)), ws, x)
    backward = counting.flops(reference, ws, x) - forward
    i, w = counting.jaxpr_flops(programs.i), counting.jaxpr_flops(programs.w)
    assert i + w <= 1.01 * backward


@pytest.mark.parametrize(
    "seed",
    [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 30))],
)
def test_random_program(seed, monkeypatch):
    check(program(random.Random(seed)), seed, monkeypatch)


def ignored_operand(ws, x):
    # The cond's body ignores what one branch alone would read.
    def body(x, w):
        return lax.cond(x[0, 0] > 9, lambda x: x @ w, lambda x: jnp.tanh(x), x), w

    x, _ = lax.scan(body, x, jnp.stack([ws[0] @ ws[1], ws[1]]))
    return x @ ws[2]


def barrier_over_unread_weight(ws, x):
    def body(x, w):
        return jax.checkpoint(lambda ws, x: jnp.tanh(x @ ws[2] @ ws[0]))(w, x), None

    return lax.scan(body, x, stack(ws, 2))[0]


def recomputed_only_for_weights(ws, x):
    # Linear layers before a loop: only the loop's W needs their recomputation.
    def layers(x):
        h = x @ ws[2] @ ws[2]
        half = jnp.stack([h, h * 0.5]).astype(jnp.float16).astype(jnp.float32)
        return lax.map(lambda row: row @ ws[2], half).sum(0)

    return lax.cond(
        x[0, 0] > 9, lambda x: x @ ws[0], jax.checkpoint(layers, prevent_cse=False), x
    )


def loop_inside_shard_map(ws, x):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))

    def body(ws, x):
        def layer(x, w):
            return lax.psum(jnp.tanh(x @ w), "a") / 2 + x, None

        return lax.scan(jax.checkpoint(layer), x, jnp.stack(ws))[0]

    specs = {"in_specs": (P(), P(None, None)), "out_specs": P(None, None)}
    return jax.shard_map(body, mesh=mesh, check_vma=False, **specs)(ws, x)


@pytest.mark.parametrize(
    "fn",
    [
        ignored_operand,
        barrier_over_unread_weight,
        recomputed_only_for_weights,
        loop_inside_shard_map,
    ],
)
def test_what_random_programs_found(fn, monkeypatch):
    check(fn, 0, monkeypatch)
