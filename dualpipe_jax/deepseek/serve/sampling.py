"""The next tokens, and their log probabilities, from logits.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualpipe_jax.deepseek.serve.arrays import MAX_TOP, Chosen, Sampling


def choose_tokens(
    logits_BU: jax.Array, position_B: jax.Array, sampling: Sampling
) -> Chosen:
    """Takes the most likely tokens, or draws tokens at a temperature.

    Args:
      logits_BU: [B, vocabulary] float32.
      position_B: [B] int32, positions of the tokens to choose.
      sampling: of the requests.

    Returns:
      `Chosen`.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.1, 0.9], [0.6, 0.4]]))
      >>> chosen = choose_tokens(logits, jnp.array([5, 7]), greedy((2,)))
      >>> chosen.tokens.tolist()
      [1, 0]
    """
    greedy_B = jnp.argmax(logits_BU, axis=-1).astype(jnp.int32)

    def draw(logits_BU: jax.Array) -> jax.Array:
        is_warm_B = sampling.temperature > 0
        temperature_B = jnp.where(is_warm_B, sampling.temperature, 1.0)
        warm_BU = logits_BU / temperature_B[:, None]
        warm_BU = jax.lax.cond(
            (sampling.top_p < 1).any(),
            lambda warm_BU: _keep_most_likely(warm_BU, sampling.top_p),
            lambda warm_BU: warm_BU,
            warm_BU,
        )

        def one(warm_U, position, seed):
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.categorical(key, warm_U)

        drawn_B = jax.vmap(one)(warm_BU, position_B, sampling.seed)
        return jnp.where(is_warm_B, drawn_B.astype(jnp.int32), greedy_B)

    is_any = (sampling.temperature > 0).any()
    tokens_B = jax.lax.cond(is_any, draw, lambda _: greedy_B, logits_BU)
    return _with_logprobs(logits_BU, tokens_B, sampling.has_logprobs.any())


def greedy(shape: tuple[int, ...]) -> Sampling:
    """Returns the sampling of requests that take the most likely token each time."""
    return Sampling(
        temperature=jnp.zeros(shape, jnp.float32),
        seed=jnp.zeros(shape, jnp.int32),
        top_p=jnp.ones(shape, jnp.float32),
        has_logprobs=jnp.zeros(shape, bool),
    )


def _keep_most_likely(logits_BU: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Leaves out what is beyond the most likely tokens; the first always stays."""
    sorted_BU = jnp.sort(logits_BU, axis=-1, descending=True)
    probability_BU = jax.nn.softmax(sorted_BU, axis=-1)
    before_BU = jnp.cumsum(probability_BU, axis=-1) - probability_BU
    is_kept_BU = before_BU < top_p_B[:, None]
    is_kept_BU = is_kept_BU.at[:, 0].set(True)
    least_B1 = jnp.where(is_kept_BU, sorted_BU, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BU >= least_B1, logits_BU, -jnp.inf)


def _with_logprobs(logits_BU: jax.Array, tokens_B: jax.Array, has: jax.Array) -> Chosen:
    num_top = min(MAX_TOP, logits_BU.shape[-1])

    def compute(logits_BU: jax.Array, tokens_B: jax.Array) -> Chosen:
        logprob_BU = jax.nn.log_softmax(logits_BU, axis=-1)
        logprob_B1 = jnp.take_along_axis(logprob_BU, tokens_B[:, None], axis=-1)
        top_BK, top_tokens_BK = jax.lax.top_k(logprob_BU, num_top)
        return Chosen(
            tokens_B, logprob_B1[:, 0], top_tokens_BK.astype(jnp.int32), top_BK
        )

    def leave_out(_: jax.Array, tokens_B: jax.Array) -> Chosen:
        zeros_B = jnp.zeros(len(tokens_B), jnp.float32)
        zeros_BK = jnp.zeros((len(tokens_B), num_top), jnp.float32)
        return Chosen(tokens_B, zeros_B, zeros_BK.astype(jnp.int32), zeros_BK)

    return jax.lax.cond(has, compute, leave_out, logits_BU, tokens_B)
