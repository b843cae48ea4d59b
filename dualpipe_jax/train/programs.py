"""The programs of a training run, jitted and then compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dualpipe_jax import compat
from dualpipe_jax.executor import BufferBytes
from dualpipe_jax.gpu.overlap import compile_for, options_here
from dualpipe_jax.processes import distributed
from dualpipe_jax.schedules import Schedule
from dualpipe_jax.train.agreement import digest_of_collectives
from dualpipe_jax.train.compiling import CompileProgress, Job, compile_together
from dualpipe_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Programs:
    """A run's programs: jitted functions, compiled ones once `compile` returns them.

    Attributes:
      schedule: what the pipeline runs.
      mesh: the devices.
      abstract_state: shapes and shardings of the state, to restore one into.
      abstract_tokens: the same for a batch's inputs, and for its targets.
      init: () -> TrainState.
      train_step: (state, inputs, targets) -> (state, metrics); reuses the state's
        buffers for its result. Beside what is logged, metrics has `grads_finite`: bool,
        one for each of `grad_names`.
      held_out_loss: (state, inputs, targets) -> mean loss.
      buffers: () -> what the train step keeps on one device from tick to tick.
      lower_costliest_task: () -> its costliest task alone, lowered; see `PipelineStep`.
      checkpoint_info: what a checkpoint records about the model and its layout; JSON.
      restore_plan: `checkpoint_info` of the programs that wrote a checkpoint ->
        (the abstract state to read, the function from that to this run's state).
        Raises ValueError for another model.
      grad_names: the parameters that have a gradient, by their path.
      published: state -> the same with published weights, or None.
      sample: (state, prompt tokens [n] int32) -> new tokens, or None.
      vocab_size: see `PipelineModel`.
      description: see `PipelineModel`.
      compiled: the train step as XLA has compiled it; None before `compile`.
      collectives: for each compiled program a digest of its collectives, in a run of
        several processes.
    """

    schedule: Schedule
    mesh: Mesh
    abstract_state: TrainState
    abstract_tokens: jax.ShapeDtypeStruct
    init: Any
    train_step: Any
    held_out_loss: Any
    buffers: Callable[[], BufferBytes]
    lower_costliest_task: Callable[[], Any]
    checkpoint_info: dict[str, Any]
    restore_plan: Callable[[dict[str, Any]], tuple[TrainState, Callable]]
    grad_names: tuple[str, ...]
    published: Callable[[TrainState], TrainState] | None
    sample: Callable[..., np.ndarray] | None
    vocab_size: int | None
    description: str
    compiled: jax.stages.Compiled | None = None
    collectives: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Raises a ValueError for tokens outside of the model's vocabulary."""
        if tokens.min() < 0:
            raise ValueError(
                f"the data holds token {tokens.min()}; tokens are at least 0, and "
                "ignore_index names one that is no target."
            )
        if self.vocab_size is not None and tokens.max() >= self.vocab_size:
            raise ValueError(
                f"the data holds token {tokens.max()}, but the model's vocab_size is "
                f"{self.vocab_size}; use data of its vocabulary."
            )

    def compile(self, progress: CompileProgress | None = None) -> Programs:
        """Compiles ahead of the first step; nothing compiles after that.

        Args:
          progress: where to show what compiles.
        """
        tokens = self.abstract_tokens
        args = (self.abstract_state, tokens, tokens)
        on_cpu = compat.platform_of(self.mesh) == "cpu"
        options = {} if on_cpu else options_here()
        # Drawing random bits takes little time however they are compiled, but
        # optimizing the code for it takes much: as much as a train step's.
        quick = {"xla_backend_optimization_level": 0} if on_cpu else {}
        jobs = (
            Job(
                "train step",
                lambda: self.train_step.lower(*args),
                lambda lowered: compile_for(lowered, self.mesh),
            ),
            Job(
                "evaluation",
                lambda: self.held_out_loss.lower(*args),
                lambda lowered: lowered.compile(options),
            ),
            Job(
                "initial state",
                lambda: self.init.lower(),
                lambda lowered: lowered.compile({**options, **quick}),
            ),
        )
        compiled = compile_together(jobs, progress, mesh=self.mesh)
        train_step, held_out_loss, init = compiled
        digests = {}
        if distributed.num_processes() > 1:
            digests = {
                job.name: digest_of_collectives(each.as_text())
                for job, each in zip(jobs, compiled, strict=True)
            }
        return dataclasses.replace(
            self,
            train_step=self._taking_whole_batches(train_step),
            held_out_loss=self._taking_whole_batches(held_out_loss),
            init=init,
            compiled=train_step,
            collectives=digests,
        )

    def _taking_whole_batches(self, compiled: Any) -> Any:
        """Each process has the whole batch, and gives its devices their parts of it."""
        tokens = self.abstract_tokens

        def call(state: TrainState, *batch: np.ndarray) -> Any:
            for tokens_of in batch:
                self.check_tokens(tokens_of)
            parts = [
                jax.make_array_from_callback(
                    tokens.shape,
                    tokens.sharding,
                    lambda index, whole=whole: whole[index],
                )
                for whole in batch
            ]
            return compiled(state, *parts)

        return call
