"""What a step minimizes: a model's loss, with weights of targets, and keys."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax.executor import Weighted, divide_or_zero, takes_key, with_key
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.mesh import DATA_AXES
from dualpipe_jax.train.model import PipelineModel

PyTree = Any
# Of the config's seed: apart from the keys that parameters are drawn with.
_NOISE = 2**31


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a model as a config wants it.

    Attributes:
      model: whose loss it is.
      ignore_index: see `TrainConfig`.
      seed: of the run.
    """

    model: PipelineModel
    ignore_index: int | None
    seed: int

    @classmethod
    def of(cls, config: TrainConfig, model: PipelineModel) -> Objective:
        """The objective of a run.

        Raises:
          ValueError: targets are ignored, but the model's loss takes no weights.
        """
        for name in ("loss", "evaluate") if config.ignore_index is not None else ():
            if "weights" not in inspect.signature(getattr(model, name)).parameters:
                raise ValueError(
                    f"{config.ignore_index=} needs a model whose {name} takes the "
                    f"weights of targets, but {type(model).__name__}.{name} has no "
                    "parameter weights; see PipelineModel.loss."
                )
        return cls(model, config.ignore_index, config.seed)

    # For the pipeline.

    @property
    def loss_fn(self) -> Any:
        """The loss of one microbatch, of targets as `weighted` returns them."""
        if self.ignore_index is None:
            return self.model.loss

        loss: Any = self.model.loss

        def loss_fn(params: PyTree, x: PyTree, targets: PyTree, *, key=None) -> Any:
            weighted = functools.partial(loss, weights=targets[1])
            return with_key(weighted, key, params, x, targets[0])

        return loss_fn

    def weighted(self, targets: jax.Array) -> PyTree:
        """Targets, or (targets, their weights) if some are ignored.

        Args:
          targets: of the whole step, [num_microbatches, microbatch, sequence] int32.
        """
        if self.ignore_index is None:
            return targets
        counts = (targets != self.ignore_index).astype(jnp.float32)
        # Their mean over the step is 1, however they are spread over microbatches and
        # devices; a step of nothing but ignored targets has the loss 0.
        return targets, counts / jnp.maximum(counts.mean(), 1 / counts.size)

    def key(self, step: jax.Array) -> jax.Array | None:
        """The key of a step, or None if no function of the model takes one."""
        model = self.model
        stages = model.stage_fns
        stages = [stages] if callable(stages) else stages
        if not any(map(takes_key, (model.embed, model.loss, *stages))):
            return None
        noise = jax.random.fold_in(jax.random.key(self.seed), _NOISE)
        return jax.random.fold_in(noise, step)

    # For evaluation, inside `jax.shard_map`.

    def evaluate(
        self, embed: PyTree, head: PyTree, outputs: PyTree, targets: PyTree
    ) -> jax.Array:
        """The loss on held-out text.

        Args:
          embed: parameters of the embedding.
          head: parameters of the head.
          outputs: of the last stage, leaves [num_microbatches, microbatch, ...].
          targets: as `weighted` returns them.
        """
        evaluate = functools.partial(self.model.evaluate, embed, head)

        def of_microbatch(outputs: PyTree, targets: PyTree) -> Any:
            if self.ignore_index is None:
                return evaluate(outputs, targets)
            targets, weights = targets
            return evaluate(outputs, targets, weights=weights)

        losses = lax.map(lambda batch: of_microbatch(*batch), (outputs, targets))
        if not isinstance(losses, Weighted):
            return lax.pmean(losses.mean(), DATA_AXES)
        total, weight = lax.psum(
            (losses.total.sum(), losses.weight.astype(jnp.float32).sum()), DATA_AXES
        )
        return divide_or_zero(total, weight)
