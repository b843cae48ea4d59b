"""The terms of the loss.

Shape suffixes: see `dualpipe_jax.deepseek.config`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax


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
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and the mean square of the log-normaliser."""
    logits = logits_of(hidden, kernel)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return losses.mean(), jnp.square(normaliser).mean()
