"""Names in the compiled program mark the work for weight gradients."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dualpipe_jax import split_vjp
from dualpipe_jax.backward.split_backward import SplitBackward
from dualpipe_jax.pictures.phases import phase

W, X = jnp.ones((3, 4, 4)), jnp.ones((2, 4))


def layer(w, x):
    with jax.named_scope("mlp"):
        return jnp.tanh(x @ w)


def unrolled(w, x):
    for k in range(3):
        x = layer(w[k], x)
    return x


def scanned(w, x):
    return lax.scan(lambda x, w: (layer(w, x), None), x, w)[0]


def phases(fn, *args):
    """Returns the phases of a compiled program's dots, or of their replacements."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    names = re.findall(r'op_name="([^"]*(?:dot_general|transpose))"', text)
    return {phase(name) for name in names}


@pytest.mark.parametrize("fn", [unrolled, scanned])
def test_the_whole_backward_names_both_halves(fn):
    plan = SplitBackward.trace(fn, W, X)
    _, residuals = plan.forward(W, X)
    assert phases(plan.backward, W, residuals, X) == {"mlp(B)", "mlp(W)"}


@pytest.mark.parametrize("fn", [unrolled, scanned])
def test_each_half_names_itself(fn):
    _, backward_input, backward_weights = split_vjp(fn, W, X)
    _, saved = backward_input(X)
    assert phases(backward_input, X) == {"mlp(B)"}
    assert phases(backward_weights, saved) == {"mlp(W)"}
