"""The terms of the loss.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

# 512 MiB in float32.
MAX_LOGITS = 2**27


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_loss(x: jax.Array, loss: jax.Array, weight: float) -> jax.Array:
    """Returns `x`; its backward pass adds the gradient of `weight * loss`.

    A stage contributes to the step's loss this way without passing a scalar from stage
    to stage; DeepSeek-V2's published model does the same.

    Args:
      x: activations.
      loss: [] float32.
      weight: factor of `loss` in the step's loss.
    """
    del loss, weight
    return x


add_loss.defvjp(
    lambda x, loss, weight: (x, loss),
    lambda weight, loss, ct: (ct, jnp.full_like(loss, weight)),
)


def logits_of(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns [batch, sequence, vocabulary] float32 from normalized activations."""
    return jnp.einsum("btd,du->btu", hidden, kernel, preferred_element_type=jnp.float32)


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    max_logits: int = MAX_LOGITS,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy, and the mean square of the log-normalizer.

    Args:
      hidden: [batch, sequence, D], normalized activations.
      kernel: [D, vocabulary].
      targets: [batch, sequence] int32.
      weights: [batch, sequence] float32, factors of the terms of the means.
      max_logits: see `cross_entropies`.

    Returns:
      Two [] float32.
    """
    sets = [(hidden, targets, weights)]
    return cross_entropies(sets, kernel, max_logits=max_logits)[0]


def cross_entropies(
    sets: Sequence[tuple[jax.Array, jax.Array, jax.Array | None]],
    kernel: jax.Array,
    *,
    max_logits: int = MAX_LOGITS,
) -> list[tuple[jax.Array, jax.Array]]:
    """Computes `cross_entropy` for several sets of tokens, in one pass over the kernel.

    One pass has one gradient of the kernel. A pass for each set would hold one gradient
    each until they are added: 1.7 GiB each for DeepSeek-V3, in bfloat16.

    Args:
      sets: (hidden [batch, sequence, D], targets [batch, sequence], weights of the
        targets [batch, sequence] or None).
      kernel: [D, vocabulary].
      max_logits: how many logits to compute at a time; beyond one chunk, the backward
        pass recomputes them. DeepSeek-V3's logits for one sequence are 2 GiB.

    Returns:
      For each set two [] float32; zeros for a set without tokens.
    """
    numbers = [targets.size for _, targets, _ in sets]
    num_tokens, width = sum(numbers), kernel.shape[0]
    hidden = jnp.concatenate([hidden.reshape(-1, width) for hidden, _, _ in sets])
    targets = jnp.concatenate([targets.reshape(-1) for _, targets, _ in sets])
    # [tokens, sets], 1 (or the weights) for the tokens of a set.
    owner = np.repeat(np.arange(len(sets)), numbers)
    weights = jnp.asarray(owner[:, None] == np.arange(len(sets)), jnp.float32)
    if any(given is not None for *_, given in sets):
        factors = [
            jnp.ones(number) if given is None else given.reshape(-1)
            for number, (*_, given) in zip(numbers, sets, strict=True)
        ]
        weights = weights * jnp.concatenate(factors)[:, None]

    def sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array):
        logits = logits_of(hidden[None], kernel)[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        terms = jnp.stack([losses, jnp.square(normalizer)])
        return (terms[..., None] * weights[None]).sum(axis=1)

    parts = min(num_tokens, -(-num_tokens * kernel.shape[1] // max_logits))
    if parts <= 1:
        totals = sums(hidden, targets, weights)
    else:
        size = -(-num_tokens // parts)

        def cut(x: jax.Array) -> jax.Array:
            """Divides the tokens into parts; padding of the last one has no weight."""
            room = [(0, parts * size - num_tokens), *((0, 0) for _ in x.shape[1:])]
            return jnp.pad(x, room).reshape(parts, size, *x.shape[1:])

        totals = jax.lax.map(
            lambda part: jax.checkpoint(sums)(*part),
            (cut(hidden), cut(targets), cut(weights)),
        ).sum(axis=0)
    counts = [max(1, number) for number in numbers]
    return [(totals[0, i] / n, totals[1, i] / n) for i, n in enumerate(counts)]
