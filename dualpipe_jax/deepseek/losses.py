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
    num_tokens, dim = targets.size, hidden.shape[-1]

    def sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array):
        logits = logits_of(hidden, kernel)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        return (losses * weights).sum(), (jnp.square(normaliser) * weights).sum()

    parts = min(num_tokens, -(-num_tokens * kernel.shape[1] // max_logits))
    weights = jnp.ones(targets.shape, jnp.float32)
    if parts == 1:
        loss, square = sums(hidden, targets, weights)
        return loss / num_tokens, square / num_tokens
    size = -(-num_tokens // parts)

    def cut(x: jax.Array, *tail: int) -> jax.Array:
        """In parts, the last one filled up with tokens of no weight."""
        flat = x.reshape(num_tokens, *tail)
        room = [(0, parts * size - num_tokens), *((0, 0) for _ in tail)]
        return jnp.pad(flat, room).reshape(parts, 1, size, *tail)

    losses, squares = jax.lax.map(
        lambda part: jax.checkpoint(sums)(*part),
        (cut(hidden, dim), cut(targets), cut(weights)),
    )
    return losses.sum() / num_tokens, squares.sum() / num_tokens
