"""The training job's interface to a model: pure functions, and hooks around a step.

The job knows no architecture. `dualpipe_jax.deepseek` comes with it; your own model is
a subclass of `PipelineModel` with four methods.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from dualpipe_jax.executor import PipelineParams
from dualpipe_jax.schedules import Schedule

PyTree = Any


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen dataclass that lays its model over a schedule's stages."""

    def build(
        self,
        schedule: Schedule,
        mesh: Mesh,
        *,
        microbatch_size: int,
        sequence_length: int,
    ) -> PipelineModel:
        """The model for one schedule on one mesh, with the axes pp, dp and ep.

        Args:
          schedule: the pipeline's.
          mesh: where it runs.
          microbatch_size: sequences of a microbatch, over dp and ep.
          sequence_length: tokens of a sequence.

        Raises:
          ValueError: it does not fit them.
        """
        ...


class PipelineModel(abc.ABC):
    """A model laid over the stages of one schedule, on one mesh.

    All methods are pure and may be traced. `embed`, `stage`, `loss` and `evaluate` see
    one microbatch and run inside `jax.shard_map`: see `pipeline_value_and_grad`. The
    first three may have a parameter `key=None`, for dropout: each of their calls in a
    train step gets a key of its own, and none in evaluations.

    Attributes:
      description: how the model is laid out, for the reader of a log; may be empty.
      vocab_size: tokens are below it; None if it is not known.
      tied: whether `loss` gets (embed, head) instead of the head's parameters.
      param_specs: how parameters lie on the mesh beside the pipeline's axis, a prefix
        of their tree; the stage axis is left out.
      prepared_specs: the same for the result of `prepare_params`; None: the same as
        `param_specs`.
    """

    description: str = ""
    vocab_size: int | None = None
    tied: bool = False
    param_specs: PipelineParams = PipelineParams()
    prepared_specs: PipelineParams | None = None

    @abc.abstractmethod
    def init(self, key: jax.Array) -> PipelineParams:
        """Parameters; each leaf of `stages` is [num_stages, ...]."""

    @abc.abstractmethod
    def embed(self, params: PyTree, tokens: jax.Array) -> PyTree:
        """Activations of tokens [batch, sequence]."""

    @abc.abstractmethod
    def stage(self, params: PyTree, x: PyTree) -> PyTree:
        """One stage: activations, or (activations, aux)."""

    @property
    def stage_fns(self) -> Any:
        """`stage`, or a function for each stage: see `pipeline_value_and_grad`."""
        return self.stage

    @abc.abstractmethod
    def loss(self, params: PyTree, x: PyTree, targets: jax.Array) -> Any:
        """Mean loss of targets [batch, sequence] in nats, or (that, aux).

        May have a parameter `weights=None`, which the config's `ignore_index` needs:
        [batch, sequence] float32, 0 for targets that are ignored; for the others one
        number, such that the mean of all weights of a step is 1. So the mean of the
        weighted losses, `(losses * weights).mean()`, is right however the others are
        spread over microbatches and devices. Or the loss is a `Weighted` sum, of what
        the model itself counts.
        """

    def evaluate(
        self,
        embed: PyTree,
        head: PyTree,
        x: PyTree,
        targets: jax.Array,
        weights: jax.Array | None = None,
    ) -> Any:
        """The loss on held-out text: that of the next token, without other terms."""
        given = {} if weights is None else {"weights": weights}
        loss = self.loss((embed, head) if self.tied else head, x, targets, **given)
        return loss[0] if isinstance(loss, tuple) else loss

    def init_buffers(self) -> PyTree:
        """State that steps change beside the parameters, in checkpoints too; arrays."""
        return ()

    def prepare_params(self, params: PipelineParams, buffers: PyTree) -> PipelineParams:
        """The parameters that the pipeline runs with: cast, gathered, with tables."""
        del buffers
        return params

    def unprepare_grads(self, grads: PipelineParams, buffers: PyTree) -> PipelineParams:
        """Gradients of the parameters, from those of what `prepare_params` returned."""
        del buffers
        return grads

    def observe(
        self, buffers: PyTree, aux: PyTree, step: jax.Array
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The buffers of the next step, and what to log about this one.

        Args:
          buffers: of this step.
          aux: auxiliary outputs, summed over microbatches and the mesh beside `pp`.
          step: number of this step, from 1.

        Returns:
          (buffers, scalars by name).
        """
        del aux, step
        return buffers, {}

    @property
    def checkpoint_info(self) -> dict[str, Any]:
        """What a checkpoint records about the model and its layout; JSON."""
        return {}

    def from_checkpoint_info(self, info: dict[str, Any]) -> PipelineModel:
        """This model in the layout of a checkpoint.

        Raises:
          ValueError: the checkpoint is of another model.
        """
        del info
        return self

    def convert_params(self, params: PipelineParams, old: Any) -> PipelineParams:
        """Parameters of `old`, or trees like them, in this model's layout."""
        del old
        return params

    def convert_buffers(self, buffers: PyTree, old: Any) -> PyTree:
        """Buffers of `old`, in this model's layout."""
        del old
        return buffers

    def published(
        self, folder: str
    ) -> Callable[[PipelineParams, PyTree], tuple[PipelineParams, PyTree]]:
        """Opens a folder with published weights of this model.

        Args:
          folder: that of `TrainConfig.pretrained`.

        Returns:
          A function from parameters and buffers, of which it uses shapes and shardings,
          to those to begin with.

        Raises:
          ValueError: the folder is not that of this model, or the model reads none.
        """
        raise ValueError(
            f"pretrained={folder!r}: {type(self).__name__} reads no published weights; "
            "leave it out."
        )

    def sample(
        self, params: PipelineParams, buffers: PyTree, prompt: Any, num_tokens: int
    ) -> Any:
        """New tokens [num_tokens] after a prompt [n]; None if it generates none."""
        del params, buffers, prompt, num_tokens
