"""The layer with products in float8, against the same layer in float32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eplb_jax import ExpertTables, MoE, mix_experts
from eplb_jax.layer.parallel import ExpertParallel
from tests.eplb.layer.moe_cases import DEVICES, on_eight, on_one, with_gradients

DIM, HIDDEN, EXPERTS, K, TOKENS = 128, 136, 16, 3, 48

_RNG = np.random.default_rng(0)
X = jnp.asarray(_RNG.standard_normal((TOKENS, DIM)), jnp.float32)


@functools.cache
def run(parallel=None, **changes):
    """Outputs and gradients, and what the layer counted."""
    sizes = {"num_experts": EXPERTS, "top_k": K, "num_shared": 1}
    sizes |= {"parallel": parallel or ExpertParallel()} | changes
    model = MoE(DIM, HIDDEN, **sizes, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    each = on_one
    if parallel:
        # Exchanges in groups of devices do not work with these checks.
        each = functools.partial(on_eight, check_vma=parallel.route == "direct")

    def call(params, tables, x):
        return each(tables, graph, params, rest, x)

    spread = np.concatenate([np.arange(EXPERTS), np.arange(8)])
    tables = ExpertTables.from_placement(spread, EXPERTS)
    return with_gradients(call, params, out=X[::-1])(tables, X)[0]


def distance(got, want):
    """The largest relative distance of an array, by its norm."""
    return max(
        np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) / np.linalg.norm(theirs)
        for ours, theirs in zip(
            jax.tree.leaves(got), jax.tree.leaves(want), strict=True
        )
    )


@pytest.mark.slow
def test_is_close_to_float32():
    # Operands have four bits, a relative error of 2.6 % (root mean square); a result
    # is of two operands, and passes two or three products.
    assert distance(run(products="fp8"), run()) < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("route", ["direct", "by_node"])
def test_what_is_sent_is_what_is_multiplied(route):
    """Tokens are quantized before they are sent, once: as if they were not sent."""
    parallel = ExpertParallel(
        "ep", DEVICES, num_nodes=2, route=route, payload="fp8", remat=route == "direct"
    )
    got, want = run(parallel, products="fp8"), run(products="fp8")
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-6)
    # Gradients of weights sum over rows, and rows of other tokens share scales.
    assert distance(got, want) < 0.05


@pytest.mark.slow
def test_exact_balance_fetches_float8_experts():
    parallel = ExpertParallel(
        "ep", DEVICES, balance="exact", num_fetched=2, payload="fp8"
    )
    got, want = run(parallel, products="fp8"), run(products="fp8")
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-6)
    assert distance(got, want) < 0.05


def test_tokens_are_quantized_once():
    """Also for the shared experts."""

    def count(parallel, **changes):
        model = MoE(
            DIM, HIDDEN, num_experts=4, top_k=2, num_shared=1, parallel=parallel,
            rngs=nnx.Rngs(0), **changes,
        )  # fmt: skip
        jaxpr = jax.make_jaxpr(lambda x: model(x)[0])(X)
        return len(re.findall(r"convert_element_type\[\s*new_dtype=float8", str(jaxpr)))

    # Three matrices and what enters the last of them, routed and shared; the tokens.
    assert count(ExpertParallel(payload="fp8"), products="fp8") == 4 + 4 + 1
    assert count(ExpertParallel(payload="fp8")) == 1


def test_unknown_products():
    with pytest.raises(ValueError, match="products='int8' must be one of plain, fp8"):
        MoE(8, 8, num_experts=2, top_k=1, products="int8", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="products='int8' must be one of plain, fp8"):
        mix_experts(X, None, None, None, products="int8")
