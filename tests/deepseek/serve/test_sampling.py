"""The next tokens and their log probabilities, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax.deepseek.serve.arrays import MAX_TOP
from dualpipe_jax.deepseek.serve.sampling import choose_tokens, greedy

BATCH, VOCABULARY = 400, 24
choose = jax.jit(choose_tokens)


def drawn(logits, temperature, top_p, seed=0, **changes):
    sampling = greedy((BATCH,))._replace(
        temperature=jnp.full(BATCH, temperature),
        top_p=jnp.full(BATCH, top_p),
        seed=jnp.arange(BATCH, dtype=jnp.int32) + seed,
        **changes,
    )
    rows = jnp.tile(jnp.asarray(logits)[None], (BATCH, 1))
    return choose(rows, jnp.full(BATCH, 7, jnp.int32), sampling)


def probabilities(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    exponents = np.exp(scaled - scaled.max())
    return exponents / exponents.sum()


def test_top_p_draws_from_the_most_likely_tokens_only():
    logits = np.random.default_rng(0).normal(size=VOCABULARY).astype(np.float32) * 2
    order = np.argsort(-logits)
    for temperature, top_p in ((1.0, 0.5), (0.7, 0.9), (1.5, 0.2), (1.0, 1e-6)):
        likely = probabilities(logits, temperature)
        before = np.cumsum(likely[order]) - likely[order]
        kept = set(order[before < top_p].tolist())
        tokens = drawn(logits, temperature, top_p).tokens.tolist()
        assert set(tokens) <= kept
        # In proportion to the probabilities that are left: five standard deviations.
        for token in kept:
            share = likely[token] / sum(likely[each] for each in kept)
            deviation = (BATCH * share * (1 - share)) ** 0.5
            assert abs(tokens.count(token) - BATCH * share) <= 5 * deviation + 1e-6
    # Nothing left out draws the same tokens as without the option.
    whole = drawn(logits, 1.0, 1.0).tokens
    almost = drawn(logits, 1.0, 1 - 1e-6).tokens
    np.testing.assert_array_equal(whole, almost)
    # Greedy requests do not draw.
    assert set(drawn(logits, 0.0, 0.5).tokens.tolist()) == {int(order[0])}


def test_log_probabilities_are_the_models_own():
    logits = np.random.default_rng(1).normal(size=VOCABULARY).astype(np.float32)
    expected = np.log(probabilities(logits))
    has = jnp.arange(BATCH) == 3  # one asks; the temperature does not matter
    chosen = drawn(logits, 1.3, 0.9, has_logprobs=has)
    tokens = np.asarray(chosen.tokens)
    # float32: a sum of 24 exponentials and a logarithm.
    np.testing.assert_allclose(chosen.logprobs, expected[tokens], rtol=1e-5, atol=1e-6)
    order = np.argsort(-logits)[:MAX_TOP]
    assert chosen.top_tokens[3].tolist() == order.tolist()
    np.testing.assert_allclose(chosen.top_logprobs[3], expected[order], rtol=1e-5)
    without = drawn(logits, 1.3, 0.9)
    np.testing.assert_array_equal(without.tokens, tokens)
    assert not without.logprobs.any() and not without.top_logprobs.any()
