"""The loss's terms against NumPy in float64, and which token each of them is about."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax import PipelineParams
from dualpipe_jax.deepseek import DeepSeek
from dualpipe_jax.deepseek.model.losses import (
    add_loss,
    cross_entropies,
    cross_entropy,
)
from tests.deepseek.model.sizes import small


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shapes(jaxpr):
    """Of all values, in loops too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for param in eqn.params.values():
            if hasattr(inner := getattr(param, "jaxpr", param), "eqns"):
                yield from shapes(inner)


def in_numpy(hidden, kernel, targets):
    """Cross-entropy and squared log-normaliser, token by token."""
    losses, squares = [], []
    for at in np.ndindex(targets.shape):
        logits = hidden[at].astype(np.float64) @ kernel.astype(np.float64)
        normaliser = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        losses.append(normaliser - logits[targets[at]])
        squares.append(normaliser**2)
    return np.mean(losses), np.mean(squares)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1, 100])
def test_cross_entropy_and_z(dtype, scale):
    hidden, kernel = normal(0, 2, 5, 6), scale * normal(1, 6, 11)
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    targets = np.random.default_rng(2).integers(11, size=(2, 5), dtype=np.int32)
    got = jax.jit(cross_entropy)(hidden, kernel, targets)
    assert [term.dtype for term in got] == [jnp.float32] * 2
    # Products of either dtype are exact in float32; their sums are rounded.
    np.testing.assert_allclose(got, in_numpy(hidden, kernel, targets), rtol=1e-5)


@pytest.mark.parametrize("max_logits", [22, 2**20])
def test_weights_are_factors_of_the_terms(max_logits):
    hidden, kernel = normal(0, 2, 5, 6), normal(1, 6, 11)
    targets = np.random.default_rng(2).integers(11, size=(2, 5), dtype=np.int32)
    weights = np.float32([[0, 2, 2, 0, 0], [2, 2, 2, 0, 0]])
    counted = hidden[weights > 0][None], kernel, targets[weights > 0][None]
    # Their mean is 1, so that the mean over all is that of the others.
    got = cross_entropy(hidden, kernel, targets, weights, max_logits=max_logits)
    np.testing.assert_allclose(got, in_numpy(*counted), rtol=1e-5)  # f32 sums


@pytest.mark.parametrize("max_logits", [1, 22, 54, 55])
def test_a_few_logits_at_a_time_are_the_same(max_logits):
    hidden, kernel = normal(0, 2, 5, 6), normal(1, 6, 11)
    targets = np.random.default_rng(2).integers(11, size=(2, 5), dtype=np.int32)

    def total(hidden, kernel, **options):
        loss, z_loss = cross_entropy(hidden, kernel, targets, **options)
        return loss + 0.1 * z_loss

    grad = jax.value_and_grad(total, argnums=(0, 1))
    whole = jax.jit(grad)(hidden, kernel)
    limited = jax.jit(functools.partial(grad, max_logits=max_logits))
    for got, want in zip(
        *map(jax.tree.leaves, (limited(hidden, kernel), whole)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # order of sums
    sizes = {
        int(np.prod(shape))
        for shape in shapes(jax.make_jaxpr(limited)(hidden, kernel).jaxpr)
        if shape[-1:] == (11,) and shape != kernel.shape
    }
    assert sizes and max(sizes) <= max(max_logits, 11)


@pytest.mark.parametrize("max_logits", [22, 1000])
def test_without_tokens_the_loss_is_zero(max_logits):
    # As of multi-token prediction in sequences of one token.
    shapes = [(0,), (0, 5), (3, 0)]
    empty = [np.zeros((*shape, 6), np.float32) for shape in shapes]
    hidden, kernel = normal(0, 2, 5, 6), normal(1, 6, 11)
    targets = np.random.default_rng(2).integers(11, size=(2, 5), dtype=np.int32)

    def total(hidden, kernel, empty):
        nothing = [(x, np.zeros(x.shape[:-1], np.int32), None) for x in empty]
        terms = [cross_entropies(nothing, kernel, max_logits=max_logits)]
        sets = [(hidden, targets, None), *nothing]
        terms.append(cross_entropies(sets, kernel, max_logits=max_logits))
        return sum(jax.tree.leaves(terms))

    def alone(hidden, kernel):
        return sum(cross_entropy(hidden, kernel, targets))

    grad = jax.value_and_grad(total, argnums=(0, 1, 2))
    loss, (*grads, none) = jax.jit(grad)(hidden, kernel, empty)
    want = jax.jit(jax.value_and_grad(alone, argnums=(0, 1)))(hidden, kernel)
    for ours, theirs in zip((loss, *grads), (want[0], *want[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # order of sums
    assert [leaf.shape for leaf in none] == [leaf.shape for leaf in empty]


def test_add_loss_adds_a_gradient_and_no_value():
    x, weight = normal(0, 2, 3), 0.25

    def loss(x):
        return jnp.sin(x).sum()

    def added(x):
        return (add_loss(x, loss(x), weight) ** 3).sum()

    def explicit(x):
        return (x**3).sum() + weight * loss(x)

    got, grad = jax.jit(jax.value_and_grad(added))(x)
    np.testing.assert_allclose(got, (x**3).sum(), rtol=1e-5)  # float32 sum
    want = 3 * x.astype(np.float64) ** 2 + weight * np.cos(x.astype(np.float64))
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, jax.jit(jax.grad(explicit))(x), rtol=1e-5)


def test_add_loss_keeps_dtypes():
    x = jnp.ones((2, 3), jnp.bfloat16)

    def total(x, loss):
        return add_loss(x, loss, 0.5).astype(jnp.float32).sum()

    dx, dloss = jax.grad(total, argnums=(0, 1))(x, jnp.float32(7))
    assert dx.dtype == jnp.bfloat16 and (dx == 1).all()
    assert dloss.dtype == jnp.float32 and dloss == 0.5


# The whole loss of a model.

VOCAB = 12
# A cycle through all tokens: the next one is known from the present one.
NEXT = (np.arange(VOCAB) + 5) % VOCAB


def text(length):
    tokens = [3]
    while len(tokens) < length:
        tokens.append(int(NEXT[tokens[-1]]))
    return np.array([tokens], np.int32)


WEIGHTS = {"z_loss": 0.5, "mtp_weight": 0.25, "balance_loss": 2.0}


@functools.cache
def loss_of(tied):
    """A function of (params, x, targets), and the parameters' shapes."""
    arch = small(
        vocab_size=VOCAB,
        hidden_size=VOCAB,
        num_nextn_predict_layers=1,
        tie_word_embeddings=tied,
    )
    model = DeepSeek(architecture=arch, **WEIGHTS).build_unpipelined()

    def loss(params, x, targets):
        prepared = model.prepare_params(params, model.init_buffers())
        return model.loss((prepared.embed, prepared.head), x, targets)

    return jax.jit(loss), jax.eval_shape(lambda: model.init(jax.random.key(0)))


def zeros():
    shapes = loss_of(tied=False)[1]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    for norm in ("hidden_norm", "token_norm", "norm"):
        params.head["mtp"][norm]["scale"][...] = 1
    return params


def random():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), zeros()
    )


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_multi_token_prediction_is_of_the_token_after_the_next(ahead):
    """A module that passes the next token on, and a head that looks further ahead.

    At position i the module is given token i + 1, and the head predicts the token
    `ahead` of that. All positions are right for `ahead` = 1, and none for others, as no
    token comes twice. The last position has no such token, and counts nothing.
    """
    params = zeros()
    assert len(set(text(VOCAB)[0])) == VOCAB
    tokens = text(8)
    params.head["mtp"]["project"][VOCAB:] = np.eye(VOCAB)  # and nothing of x
    params.embed[...] = np.eye(VOCAB)
    answer = np.arange(VOCAB)
    for _ in range(ahead):
        answer = NEXT[answer]
    params.head["kernel"][np.arange(VOCAB), answer] = 10
    x = normal(0, 1, 7, VOCAB)
    _, aux = loss_of(tied=False)[0](params, x, tokens[:, 1:])
    # Norms make sqrt(VOCAB) of the one, so that the right token leads by 34 nats.
    if ahead == 1:
        assert aux["mtp_loss"] < 1e-6
    else:
        np.testing.assert_allclose(aux["mtp_loss"], 10 * VOCAB**0.5, rtol=1e-4)


def test_the_modules_first_half_is_the_models_state():
    """Equation 21: the state at position i comes before the token at i + 1."""
    params = zeros()
    params.head["mtp"]["project"][:VOCAB] = np.eye(VOCAB)
    tokens = text(8)
    params.head["kernel"][...] = 10 * np.eye(VOCAB)
    # A model that knows, at position i, what comes at i + 2.
    x = np.eye(VOCAB, dtype=np.float32)[tokens[:, 2:]]
    x = np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)
    _, aux = loss_of(tied=False)[0](params, x, tokens[:, 1:])
    assert aux["mtp_loss"] < 1e-6


def test_the_loss_is_the_weighted_sum_of_its_terms():
    params = random()
    x, targets = normal(1, 1, 7, VOCAB), text(8)[:, 1:]
    total, aux = loss_of(tied=False)[0](params, x, targets)
    scale = params.head["norm"]["scale"]
    hidden = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    loss, z = in_numpy(hidden * scale, params.head["kernel"], targets)
    np.testing.assert_allclose([aux["loss"], aux["z_loss"]], [loss, z], rtol=1e-5)
    terms = [aux["z_loss"], aux["mtp_loss"], aux["mtp"]["balance_loss"]]
    assert min(terms) > 0.1
    want = aux["loss"] + np.dot(list(WEIGHTS.values()), terms)
    np.testing.assert_allclose(total, want, rtol=1e-6)  # float32


def test_a_tied_head_is_the_embedding_transposed():
    params = random()
    head = {name: leaf for name, leaf in params.head.items() if name != "kernel"}
    tied_params = PipelineParams(params.stages, params.embed, head)
    params.head["kernel"][...] = params.embed.T
    x, targets = normal(1, 1, 7, VOCAB), text(8)[:, 1:]
    total, _ = loss_of(tied=True)[0](tied_params, x, targets)
    want, _ = loss_of(tied=False)[0](params, x, targets)
    np.testing.assert_allclose(total, want, rtol=1e-6)  # float32
