"""Prints and callbacks of split functions, and the names of their operations."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax.backward.split_backward import SplitBackward

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((8, 8)) / 3, jnp.float32)
X = jnp.asarray(RNG.standard_normal((8, 8)), jnp.float32)


def layer(w, x):
    return jnp.tanh(x @ w)


def test_named_scopes_survive():
    @jax.jit
    def block(w, x):
        with jax.named_scope("inside"):
            return jnp.sin(x @ w)

    def fn(ws, x):
        with jax.named_scope("around"):
            return lax.scan(lambda x, w: (block(w, x), None), x, ws)[0]

    plan = SplitBackward.trace(fn, jnp.stack([W, W]), X)
    for run, args in [
        (plan.backward_input, (plan.residuals, X)),
        (plan.backward_weights, (plan.residuals, plan.wgrad_residuals)),
    ]:
        text = jax.jit(run).lower(jnp.stack([W, W]), *args).as_text(debug_info=True)
        assert "around" in text
        assert "inside" in text


class Recorder:
    """Records what a traced function reports at run time."""

    def __init__(self):
        self.names = []

    def __call__(self, name, value):
        jax.debug.callback(lambda _: self.names.append(name), value)

    def take(self):
        jax.effects_barrier()
        names, self.names = self.names, []
        return names


def test_prints_happen_once_and_where_they_belong():
    report = Recorder()

    @jax.custom_vjp
    def linear(w, x):
        return x @ w

    def backward(saved, ct):
        w, x = saved
        dw, dx = x.T @ ct, ct @ w.T
        report("dw", dw[0, 0])
        report("dx", dx[0, 0])
        return dw, dx

    linear.defvjp(lambda w, x: (x @ w, (w, x)), backward)

    def fn(w, x):
        def body(x):
            report("x", x[0, 0])
            return jnp.tanh(linear(w, x))

        return jax.checkpoint(body)(x)

    plan = SplitBackward.trace(fn, W, X)
    y, residuals = plan.forward(W, X)
    assert report.take() == ["x"]
    _, wgrad_residuals = plan.backward_input(W, residuals, y)
    assert sorted(report.take()) == ["dx", "x"]  # remat repeats the report
    plan.backward_weights(W, residuals, wgrad_residuals)
    assert report.take() == ["dw"]
    plan.backward(W, residuals, y)
    assert sorted(report.take()) == ["dw", "dx", "x"]


def test_prints_in_a_scanned_layer_happen_once_per_layer():
    report = Recorder()

    def fn(w, x):
        def body(x, _):
            report("layer", x[0, 0])
            return layer(w, x), None

        return lax.scan(body, x, None, length=3)[0]

    plan = SplitBackward.trace(fn, W, X)
    y, residuals = plan.forward(W, X)
    assert report.take() == ["layer"] * 3
    _, wgrad_residuals = plan.backward_input(W, residuals, y)
    plan.backward_weights(W, residuals, wgrad_residuals)
    assert report.take() == []
