"""Routers against the published formulas, written out token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from eplb_jax.layer.routing import (
    count_experts,
    sequence_balance_loss,
    sigmoid_group_top_k,
    softmax_top_k,
    update_bias,
)


def logits(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def deepseek_token(row, top_k, bias, num_groups, topk_groups, route_scale):
    """DeepSeek-V3, equations 12 to 16 and the group limit, for one token."""
    score = 1 / (1 + np.exp(-row.astype(np.float64)))
    biased = score + bias
    groups = np.split(np.arange(len(row)), num_groups)
    value = [np.sort(biased[group])[-2:].sum() for group in groups]
    kept = np.concatenate([groups[g] for g in np.argsort(value)[-topk_groups:]])
    experts = sorted(kept, key=lambda e: -biased[e])[:top_k]
    weights = score[experts]
    return experts, weights / weights.sum() * route_scale


@pytest.mark.parametrize("num_groups, topk_groups", [(1, 1), (8, 4), (8, 8), (4, 1)])
def test_deepseeks_router(num_groups, topk_groups):
    rows, bias = logits(40, 32), logits(32, seed=1) * 0.3
    options = {"num_groups": num_groups, "topk_groups": topk_groups}
    options["route_scale"] = 2.5
    routing = sigmoid_group_top_k(rows, 6, bias=jnp.asarray(bias), **options)
    for token, row in enumerate(rows):
        experts, weights = deepseek_token(row, 6, bias, *options.values())
        assert routing.experts[token].tolist() == experts
        np.testing.assert_allclose(routing.weights[token], weights, rtol=1e-5)
    assert routing.experts.dtype == jnp.int32
    assert routing.weights.dtype == jnp.float32


def test_softmax_router():
    rows = logits(40, 16)
    probability = np.exp(rows.astype(np.float64))
    probability /= probability.sum(axis=1, keepdims=True)
    order = np.argsort(-probability, axis=1)[:, :3]
    best = np.take_along_axis(probability, order, axis=1)
    plain = softmax_top_k(rows, 3, route_norm=False)
    normal = softmax_top_k(rows, 3, route_scale=2.0)
    np.testing.assert_array_equal(plain.experts, order)
    np.testing.assert_allclose(plain.weights, best, rtol=1e-5)
    want = 2 * best / best.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(normal.weights, want, rtol=1e-5)


@pytest.mark.parametrize("num_groups, topk_groups", [(8, 3), (4, 1), (4, 4)])
def test_deepseek_v2s_groups(num_groups, topk_groups):
    """A group is worth its best expert (arXiv:2405.04434, section 2.2.2)."""
    rows = logits(40, 32)
    options = {"num_groups": num_groups, "topk_groups": topk_groups}
    routing = softmax_top_k(rows, 6, route_norm=False, route_scale=16.0, **options)
    for token, row in enumerate(rows.astype(np.float64)):
        groups = np.split(np.arange(32), num_groups)
        best = sorted(groups, key=lambda group: -row[group].max())[:topk_groups]
        experts = sorted(np.concatenate(best), key=lambda e: -row[e])[:6]
        assert routing.experts[token].tolist() == experts
        weights = 16 * np.exp(row[experts]) / np.exp(row).sum()
        np.testing.assert_allclose(routing.weights[token], weights, rtol=1e-5)


@pytest.mark.parametrize("router", [softmax_top_k, sigmoid_group_top_k])
def test_ties_go_to_the_first_and_bfloat16_is_not_rounded_again(router):
    assert router(jnp.zeros((1, 8)), 3).experts.tolist() == [[0, 1, 2]]
    rows = jnp.asarray(logits(5, 64), jnp.bfloat16)
    np.testing.assert_array_equal(
        router(rows, 8).scores, router(rows.astype(jnp.float32), 8).scores
    )


def test_the_bias_chooses_and_does_not_weigh():
    rows = jnp.asarray(logits(10, 8))
    bias = jnp.zeros(8).at[5].set(9.0)
    routing = sigmoid_group_top_k(rows, 2, bias=bias, route_norm=False)
    assert (routing.experts[:, 0] == 5).all()
    np.testing.assert_array_equal(routing.weights[:, 0], routing.scores[:, 5])

    def total(bias):
        weights = sigmoid_group_top_k(rows, 2, bias=bias).weights
        return (weights * jnp.array([[1.0, 3.0]])).sum()

    assert not jax.grad(total)(bias).any()


def test_bias_updates_even_out_the_load():
    rows = jnp.asarray(logits(2000, 8) + np.linspace(0, 1, 8, dtype=np.float32))

    @jax.jit
    def step(bias):
        counts = count_experts(sigmoid_group_top_k(rows, 2, bias=bias).experts, 8)
        return update_bias(bias, counts, rate=2e-3), counts.max() - counts.min()

    bias = jnp.zeros(8)
    spread = []
    for _ in range(300):
        bias, difference = step(bias)
        spread.append(int(difference))
    assert spread[0] > 400
    assert max(spread[-10:]) < spread[0] / 5


def test_balance_loss_against_its_equations():
    scores = np.asarray(jax.nn.sigmoid(jnp.asarray(logits(3, 20, 8))), np.float64)
    want = []
    for sequence in scores:
        share = (sequence / sequence.sum(axis=1, keepdims=True)).mean(axis=0)
        chosen = np.zeros(8)
        for token in sequence:
            chosen[np.argsort(token)[-2:]] += 1
        want.append((chosen * 8 / (2 * 20) * share).sum())
    loss = jax.jit(sequence_balance_loss, static_argnums=1)
    ours = loss(jnp.asarray(scores, jnp.float32), 2)
    np.testing.assert_allclose(ours, want, rtol=1e-5)  # float32 means of 20
    padded = jnp.concatenate([jnp.asarray(scores, jnp.float32)] * 2, axis=1)
    is_padding = jnp.arange(40)[None] >= 20
    padded = loss(padded, 2, jnp.broadcast_to(is_padding, (3, 40)))
    np.testing.assert_allclose(padded, want, rtol=1e-5)
    # Its gradient lowers the scores of experts that are used too much.
    gradient = jax.grad(lambda s: sequence_balance_loss(s, 1).sum())(
        jnp.array([[[0.9, 0.1], [0.8, 0.2]]])
    )
    assert (gradient[0, :, 0] > 0).all()
    assert (gradient[0, :, 1] < 0).all()


def test_counts_leave_padding_out():
    experts = np.array([[0, 3], [3, 1], [-1, -1], [9, 0]])
    assert count_experts(jnp.asarray(experts), 4).tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("shape", [(0, 12), (0, 5, 12), (3, 0, 12)], ids=str)
def test_batches_without_tokens(shape):
    rows = jnp.zeros(shape)
    for routing in (
        softmax_top_k(rows, 2),
        sigmoid_group_top_k(rows, 2, num_groups=4, topk_groups=2),
    ):
        assert routing.experts.shape == routing.weights.shape == (*shape[:-1], 2)
        assert count_experts(routing.experts, 12).tolist() == [0] * 12
        assert not sequence_balance_loss(routing.scores, 2).any()


def test_bad_arguments():
    rows = jnp.zeros((2, 12))
    for call, message in [
        (lambda: softmax_top_k(rows, 13), "top_k=13 must be between 1 and the number"),
        (lambda: softmax_top_k(rows, 0), "top_k=0 must be between 1"),
        (
            lambda: sigmoid_group_top_k(rows, 2, num_groups=5),
            "num_groups=5 must divide",
        ),
        (
            lambda: sigmoid_group_top_k(rows, 2, num_groups=4, topk_groups=5),
            "topk_groups=5 must be between 1 and num_groups=4",
        ),
        (
            lambda: sigmoid_group_top_k(rows, 4, num_groups=4, topk_groups=1),
            "top_k=4 experts per token do not fit into topk_groups=1 groups of 3",
        ),
        (
            lambda: sigmoid_group_top_k(rows, 2, bias=jnp.zeros(11)),
            r"bias has shape \(11,\), but there are 12 experts",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("router", [softmax_top_k, sigmoid_group_top_k])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_found_on_request(router, value):
    @jax.jit
    @checkify.checkify
    def checked(rows):
        return router(rows, 2, check_values=True)

    rows = logits(4, 8)
    checked(rows)[0].throw()
    rows[1, 2] = value
    with pytest.raises(checkify.JaxRuntimeError, match="logits are not finite"):
        checked(rows)[0].throw()
