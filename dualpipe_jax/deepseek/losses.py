"""The terms of the loss.

Shape suffixes: see `dualpipe_jax.deepseek.config`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

# 512 MiB in float32.
MAX_LOGITS = 2**27


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_loss(x: jax.Array, loss: jax.Array, weight: float) -> jax.Array:
    """`x`, on whose way back the gradient of `weight * loss` is added.

    So a stage contributes to the step's loss without handing a scalar from stage to
    stage; DeepSeek-V2's published model does the same.

    Args:
      x: activations.
      loss: [] float32.
      weight: its factor in what is differentiated.
    """
    del loss, weight
    return x


add_loss.defvjp(
    lambda x, loss, weight: (x, loss),
    lambda weight, loss, ct: (ct, jnp.full_like(loss, weight)),
)


def logits_of(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """[batch, sequence, vocabulary] float32, of normalised activations."""
    return jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    max_logits: int = MAX_LOGITS,
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and the mean square of the log-normaliser.

    Args:
      hidden: [batch, sequence, dim], normalised activations.
      kernel: [dim, vocabulary].
      targets: [batch, sequence] int32.
      max_logits: of so many at a time; what the backward pass needs of them is computed
        again. All of DeepSeek-V3's for one sequence are 2 GiB.

    Returns:
      Two [] float32.
    """
    num_tokens, vocabulary = targets.size, kernel.shape[1]
    parts = next(
        parts
        for parts in range(1, num_tokens + 1)
        if num_tokens % parts == 0
        and (num_tokens // parts * vocabulary <= max_logits or parts == num_tokens)
    )

    def terms(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(part[0], kernel)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, part[1])
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        return losses.mean(), jnp.square(normaliser).mean()

    if parts == 1:
        return terms((hidden, targets))
    hidden = hidden.reshape(parts, 1, num_tokens // parts, hidden.shape[-1])
    targets = targets.reshape(parts, 1, num_tokens // parts)
    losses, squares = jax.lax.map(jax.checkpoint(terms), (hidden, targets))
    return losses.mean(), squares.mean()
