"""The parameters of a pipelined model, and how to make them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dualpipe_jax.executor import trainable as _trainable
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

    Examples:
      >>> params = PipelineParams({"base": jnp.ones((2, 4)), "lora": jnp.zeros((2, 1))})
      >>> trained, frozen = params.partition({"base": False, "lora": True})
      >>> jax.tree.map(jnp.shape, trained)
      PipelineParams(stages={'base': None, 'lora': (2, 1)}, embed=None, head=None)
      >>> jax.tree.map(jnp.shape, trained.combine(frozen))
      PipelineParams(stages={'base': (2, 4), 'lora': (2, 1)}, embed=None, head=None)
    """

    stages: PyTree = None
    embed: PyTree = None
    head: PyTree = None

    def partition(self, trainable: Any) -> tuple[PipelineParams, PipelineParams]:
        """Splits the parameters into those that are trained and those that are not.

        Both results have the structure of the parameters, with None at the other's
        leaves. Gradients with respect to `trainable` have the structure of the first,
        so an optimizer of it keeps no state for frozen parameters.

        Args:
          trainable: as in `pipeline_value_and_grad`.

        Returns:
          (trained, frozen).

        Raises:
          ValueError: if `trainable` does not fit the parameters.
        """
        flags = trained_flags(trainable, self)
        return select_params(self, flags), select_params(self, flags, False)

    def combine(self, other: PipelineParams) -> PipelineParams:
        """Returns all parameters of two parts that `partition` made, in any order."""
        return _trainable.combine(self, other)


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


def trained_flags(trainable: Any, params: PipelineParams) -> PipelineParams:
    """Returns flags of what is trained, one for each leaf, in the fields of the parts.

    Args:
      trainable: as in `pipeline_value_and_grad`.
      params: arrays, or shapes.

    Raises:
      ValueError: if `trainable` does not fit the parameters.
    """
    choices, where = trainable, "trainable.{}"
    if not isinstance(trainable, PipelineParams):
        where = "trainable"
        if _trainable.is_prefix(trainable) and not isinstance(trainable, bool):
            choices = PipelineParams(trainable)
        else:
            choices = PipelineParams(trainable, trainable, trainable)
    return PipelineParams(
        **{
            part: _trainable.flags_of(
                getattr(choices, part), getattr(params, part), where.format(part)
            )
            for part in ("stages", "embed", "head")
        }
    )


def select_params(
    params: PipelineParams, flags: PipelineParams, wanted: bool = True
) -> PipelineParams:
    """Returns parameters with None at the leaves whose flag is not the wanted one."""
    return PipelineParams(
        **{
            part: _trainable.select(getattr(params, part), flag, wanted)
            for part, flag in vars(flags).items()
        }
    )


def microbatch_key(key: jax.Array, stage: Any, microbatch: Any) -> jax.Array:
    """Returns the key of one stage's work on one microbatch, for any schedule.

    Args:
      key: the key that the step was called with.
      stage: logical stage; `num_stages` for the embedding, `num_stages + 1` for the
        loss.
      microbatch: number of the microbatch, counted over both directions.

    Returns:
      A key that depends on these three only.
    """
    return jax.random.fold_in(jax.random.fold_in(key, stage), microbatch)
