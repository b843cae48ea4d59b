"""The loss of a step: a mean over microbatches, or one weighted by what they hold."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("total", "weight"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Weighted:
    """What a `loss_fn` returns for a mean over tokens instead of over microbatches.

    The step's loss is then the sum of `total` over the sum of `weight`, each over all
    microbatches and all devices beside the pipeline, however unevenly tokens are
    divided among them.

    Attributes:
      total: [], floating: the sum of the losses of this microbatch (on this device).
      weight: [], a number or a bool: how many there are. It is not differentiated.

    Examples:
      >>> def loss_fn(head, y, targets):  # targets: [microbatch, length], -1: ignored
      ...     valid = targets >= 0
      ...     logits = jax.nn.log_softmax(y @ head)
      ...     chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
      ...     return Weighted(-jnp.where(valid, chosen, 0.0).sum(), valid.sum())
      >>> loss = loss_fn(jnp.eye(2), jnp.zeros((1, 3, 2)), jnp.array([[0, 1, -1]]))
      >>> print(f"{loss.total:.3f} over {loss.weight}")
      1.386 over 2
    """

    total: Any
    weight: Any


def take_apart(out: Any) -> tuple[Any, Any, PyTree]:
    """Returns (loss or total, weight or None, aux or None) of what a `loss_fn` returns.

    Args:
      out: a loss or a `Weighted`, or a pair of either and aux; arrays or shapes.
    """
    loss, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    if isinstance(loss, Weighted):
        return loss.total, loss.weight, aux
    return loss, None, aux


def output_struct(out: Any) -> Any:
    """Returns the shapes of what is kept of one microbatch's `loss_fn`."""
    struct = jax.ShapeDtypeStruct((), jnp.float32)
    return struct if take_apart(out)[1] is None else Weighted(struct, struct)


def mean_over_devices(
    outputs: Any, axes: tuple[str, ...], num_devices: int
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns the losses [num_microbatches], and what divides summed gradients.

    Args:
      outputs: losses of this device's microbatches, or their `Weighted` sums; leaves
        [num_microbatches] float32.
      axes: the mesh axes beside the pipeline's.
      num_devices: the product of their sizes.
    """
    if not isinstance(outputs, Weighted):
        losses = lax.pmean(outputs, axes) if axes else outputs
        return losses, lambda grad: grad / num_devices if axes else grad
    sums = lax.psum(outputs, axes) if axes else outputs
    # The losses' mean is the step's loss, as it is without weights.
    losses = divide_or_zero(sums.total, sums.weight.mean())
    return losses, functools.partial(divide_or_zero, divisor=sums.weight.sum())


def divide_or_zero(value: jax.Array, divisor: jax.Array) -> jax.Array:
    """Divides in float32 or wider; zero where there is nothing to divide by.

    Args:
      value: [...], floating: a sum of losses or of gradients.
      divisor: [...], a sum of weights.

    Returns:
      [...], of the dtype of `value`.
    """
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(value.dtype, divisor.dtype)
    divisor = divisor.astype(dtype)
    quotient = value.astype(dtype) / jnp.where(divisor == 0, 1, divisor)
    return jnp.where(divisor == 0, 0, quotient).astype(value.dtype)
