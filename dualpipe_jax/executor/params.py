"""The parameters of a pipelined model, and how to make them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dualpipe_jax.executor.trees import difference

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("stages", "embed", "head"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class PipelineParams:
    """Parameters of a pipelined model; a pytree, so optax and orbax accept it.

    Attributes:
      stages: one copy of every stage; each leaf has a leading axis [num_stages, ...]
        in model order. `stack_stages` makes it from a list.
      embed: parameters of `embed_fn`, or None.
      head: parameters of `loss_fn`, or None.
    """

    stages: PyTree = None
    embed: PyTree = None
    head: PyTree = None


class PipelineAux(NamedTuple):
    """Auxiliary outputs where both functions return some.

    Attributes:
      stages: of `stage_fn`, with a leading axis [num_stages, ...].
      loss: of `loss_fn`.
    """

    stages: PyTree
    loss: PyTree


def stack_stages(stages: Sequence[PyTree]) -> PyTree:
    """Stacks the parameters of stages, in model order, along a new leading axis.

    Args:
      stages: one pytree per stage, all with the same structure and shapes.

    Returns:
      One pytree whose leaves are [num_stages, ...].

    Raises:
      ValueError: if there is no stage, or stages differ in structure, shapes or dtypes.

    Examples:
      >>> import jax.numpy as jnp
      >>> stack_stages([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
      (2, 3)
    """
    if not stages:
        raise ValueError(f"{stages=} is empty; pass one pytree per stage.")
    for i, stage in enumerate(stages):
        if differs := difference(stage, stages[0]):
            raise ValueError(
                f"stages[{i}] differs from stages[0]: {differs}; stages must have the "
                "same structure, shapes and dtypes."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stages)


def microbatch_key(key: jax.Array, stage: Any, microbatch: Any) -> jax.Array:
    """Returns the key of one stage's work on one microbatch, for any schedule.

    Args:
      key: the key that the step was called with.
      stage: logical stage; `num_stages` for the embedding.
      microbatch: number of the microbatch, counted over both directions.

    Returns:
      A key that depends on these three only.
    """
    return jax.random.fold_in(jax.random.fold_in(key, stage), microbatch)
