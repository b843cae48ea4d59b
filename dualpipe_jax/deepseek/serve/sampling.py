"""The next tokens, from logits.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dualpipe_jax.deepseek.serve.arrays import Sampling


def choose_tokens(
    logits_BU: jax.Array, position_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """Takes the most likely tokens, or draws tokens at a temperature.

    Args:
      logits_BU: [B, vocabulary] float32.
      position_B: [B] int32, positions of the tokens to choose.
      sampling: of the requests.

    Returns:
      [B] int32.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.1, 0.9], [0.6, 0.4]]))
      >>> greedy = Sampling(jnp.zeros(2), jnp.zeros(2, jnp.int32))
      >>> choose_tokens(logits, jnp.array([5, 7]), greedy).tolist()
      [1, 0]
    """
    greedy_B = jnp.argmax(logits_BU, axis=-1).astype(jnp.int32)

    def draw(logits_BU: jax.Array) -> jax.Array:
        def one(logits_U, position, temperature, seed):
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.categorical(key, logits_U / temperature)

        is_warm_B = sampling.temperature > 0
        temperature_B = jnp.where(is_warm_B, sampling.temperature, 1.0)
        drawn_B = jax.vmap(one)(logits_BU, position_B, temperature_B, sampling.seed)
        return jnp.where(is_warm_B, drawn_B.astype(jnp.int32), greedy_B)

    is_any = (sampling.temperature > 0).any()
    return jax.lax.cond(is_any, draw, lambda _: greedy_B, logits_BU)
