"""The jitted programs of a run: initial state, pipelined train step, held-out loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualpipe_jax.executor import (
    PipelineParams,
    pipeline_forward,
    pipeline_value_and_grad,
)
from dualpipe_jax.schedules import Schedule
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.integrity import names_of
from dualpipe_jax.train.mesh import BATCH, DATA_AXES, check_memory, make_mesh
from dualpipe_jax.train.model import PipelineModel
from dualpipe_jax.train.objective import Objective
from dualpipe_jax.train.optimizer import learning_rate, make_optimizer, num_updates
from dualpipe_jax.train.programs import Programs
from dualpipe_jax.train.state import States, TrainState
from dualpipe_jax.train.trained import filled, prepared_flags, trained_flags

P = PartitionSpec
# Beyond any cluster, and far within what XLA counts in 64 bits.
MAX_VALUES = 2**55


def make_programs(config: TrainConfig, mesh: Mesh | None = None) -> Programs:
    """Builds everything that a run calls; nothing is compiled yet.

    Args:
      config: the run.
      mesh: the devices, with the axes pp, dp and ep in the config's sizes; by default
        the first ones that jax has. With a `gpu_mesh` the programs can be compiled
        for GPUs, but not run.

    Raises:
      ValueError: the config fits neither its schedule, its model nor the devices
        that are there.
    """
    schedule = config.make_schedule()
    if mesh is None:
        mesh = make_mesh(config)
    elif dict(mesh.shape) != config.mesh_shape:
        raise ValueError(
            f"mesh has the axes {dict(mesh.shape)}, but the config's are "
            f"{config.mesh_shape}; make it with these."
        )
    model = config.model.build(
        schedule,
        mesh,
        microbatch_size=config.microbatch_size,
        sequence_length=config.sequence_length,
    )
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    builder = _Builder(
        config=config,
        schedule=schedule,
        mesh=mesh,
        model=model,
        objective=Objective.of(config, model),
        optimizer=optimizer,
        states=States(config, model, optimizer, mesh),
    )
    programs = builder.programs()
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(programs.abstract_state))
    if size > MAX_VALUES:
        raise ValueError(
            f"The model and its optimizer have {size:.2g} numbers, more than "
            f"{MAX_VALUES:.2g}; use a smaller model."
        )
    per_device = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(programs.abstract_state)
    )
    num_here = len(set(mesh.devices.flat) & set(jax.local_devices()))
    check_memory(
        per_device * num_here, mesh, "The state of the model and its optimizer"
    )
    return programs


def lower_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The train step of a config, lowered for the devices of a mesh."""
    programs = make_programs(config, mesh)
    tokens = programs.abstract_tokens
    return programs.train_step.lower(programs.abstract_state, tokens, tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class _Builder:
    """The functions of a run, and what they are jitted with.

    Attributes:
      config: the run.
      schedule: the pipeline's.
      mesh: the devices.
      model: laid over the schedule's stages on that mesh.
      objective: the model's loss, as the config wants it.
      optimizer: of the parameters as the model lays them out.
      states: the run's, before it begins and in checkpoints.
    """

    config: TrainConfig
    schedule: Schedule
    mesh: Mesh
    model: PipelineModel
    objective: Objective
    optimizer: optax.GradientTransformation
    states: States

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments that the pipeline's two functions share."""
        return {
            "schedule": self.schedule,
            "mesh": self.mesh,
            "axis_name": "pp",
            "embed_fn": self.model.embed,
            "data_axes": DATA_AXES,
            "param_specs": self.model.prepared_specs or self.model.param_specs,
            "overlap": self.config.overlap,
        }

    @functools.cached_property
    def value_and_grad(self) -> Any:
        """The pipeline's, from prepared parameters and a batch."""
        return pipeline_value_and_grad(
            self.model.stage_fns,
            self.objective.loss_fn,
            tied=self.model.tied,
            trainable=self.prepared_flags,
            **self.layout,
        )

    @functools.cached_property
    def forward(self) -> Any:
        """The pipeline's outputs of the last stage, for evaluation."""
        return pipeline_forward(self.model.stage_fns, **self.layout)

    @functools.cached_property
    def abstract_prepared(self) -> PipelineParams:
        """Shapes of the parameters that the pipeline runs with."""
        state = self.states.abstract
        return jax.eval_shape(self.model.prepare_params, state.params, state.buffers)

    @functools.cached_property
    def prepared_flags(self) -> PipelineParams | None:
        """Which of them are trained; None: all."""
        state = self.states.abstract
        flags = trained_flags(self.config.trainable, state.params)
        if flags is None:
            return None
        prepare = self.model.prepare_params
        return prepared_flags(prepare, flags, state.params, state.buffers)

    def programs(self) -> Programs:
        """The functions, jitted."""
        states, shardings = self.states, self.states.shardings
        _ = self.value_and_grad, self.forward  # raises now if they do not fit
        return Programs(
            schedule=self.schedule,
            mesh=self.mesh,
            abstract_state=states.abstract,
            abstract_tokens=self.abstract_tokens,
            init=jax.jit(
                functools.partial(states.init_with, self.model), out_shardings=shardings
            ),
            train_step=jax.jit(
                self.train_step,
                donate_argnums=0,
                # Every process reads the metrics, those with an axis too.
                out_shardings=(shardings, NamedSharding(self.mesh, P())),
            ),
            held_out_loss=jax.jit(self.held_out_loss),
            buffers=functools.partial(self.about_step, "buffers"),
            lower_costliest_task=functools.partial(
                self.about_step, "lower_costliest_task"
            ),
            checkpoint_info=self.model.checkpoint_info,
            restore_plan=states.restore_plan,
            published=self.published(),
            sample=self.sample if self.config.sample_tokens else None,
            grad_names=tuple(names_of(states.trained(states.abstract.params))),
            vocab_size=self.model.vocab_size,
            description=self.model.description,
        )

    # The step, and the loss on text that is held out.

    def train_step(
        self, state: TrainState, inputs: jax.Array, targets: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step: the next state, and what to log."""
        model, config, step = self.model, self.config, state.step + 1
        prepared = model.prepare_params(state.params, state.buffers)
        batch = self.pipelined(inputs, targets, step)
        grads: Any
        (losses, aux), grads = self.value_and_grad(prepared, *batch)
        if self.prepared_flags is not None:
            grads = filled(grads, prepared)
        grads = self.states.trained(model.unprepare_grads(grads, state.buffers))
        trained, frozen = self.states.split(state.params)
        # optax mixes floats with its int32 counts; all else here is strict.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, trained)
            count = num_updates(state.opt_state)
            rate = learning_rate(config.optimizer, config.num_steps)(count + 1)
        params: Any = optax.apply_updates(trained, updates)
        metrics = {
            "loss": losses.mean(),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate,
        }
        buffers, observed = model.observe(state.buffers, aux, step)
        new = TrainState(step, params.combine(frozen), opt_state, buffers)
        if config.max_skipped_steps:
            new, metrics["skipped"] = _unless_finite(metrics, new, state)
        # The sums of which `grad_norm` is made.
        norms = [optax.tree.norm(leaf, squared=True) for leaf in jax.tree.leaves(grads)]
        metrics["grads_finite"] = jnp.isfinite(jnp.stack(norms))
        return new, metrics | observed

    def pipelined(
        self, inputs: jax.Array, targets: jax.Array, step: jax.Array
    ) -> tuple[Any, ...]:
        """What the pipelined part of a step takes after the parameters."""
        key = self.objective.key(step)
        batch = (inputs, self.objective.weighted(targets))
        return batch if key is None else (*batch, key)

    def held_out_loss(
        self, state: TrainState, inputs: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """The mean loss of a batch, without a backward pass."""
        prepared = self.model.prepare_params(state.params, state.buffers)
        outputs = self.forward(prepared, inputs)

        specs = self.model.prepared_specs or self.model.param_specs
        evaluate = jax.shard_map(
            self.objective.evaluate,
            mesh=self.mesh,
            in_specs=(specs.embed or P(), specs.head or P(), BATCH, BATCH),
            out_specs=P(),
            check_vma=False,
        )
        targets = self.objective.weighted(targets)
        return evaluate(prepared.embed, prepared.head, outputs, targets)

    def published(self) -> Callable[[TrainState], TrainState] | None:
        """What puts published weights into the first state, if the config wants it."""
        if self.config.pretrained is None:
            return None
        read = self.model.published(self.config.pretrained)

        def begin(state: TrainState) -> TrainState:
            params, buffers = read(state.params, state.buffers)
            return state._replace(params=params, buffers=buffers)

        return begin

    def sample(self, state: TrainState, prompt: np.ndarray) -> np.ndarray:
        """New tokens after a prompt."""
        return self.model.sample(
            state.params, state.buffers, prompt, self.config.sample_tokens
        )

    def about_step(self, method: str) -> Any:
        """What a method of the train step's pipelined part reports about it."""
        tokens, step = self.abstract_tokens, self.states.abstract.step
        batch = jax.eval_shape(self.pipelined, tokens, tokens, step)
        return getattr(self.value_and_grad, method)(self.abstract_prepared, *batch)

    @property
    def abstract_tokens(self) -> jax.ShapeDtypeStruct:
        c = self.config
        return jax.ShapeDtypeStruct(
            (c.num_microbatches, c.microbatch_size, c.sequence_length),
            np.int32,
            sharding=NamedSharding(self.mesh, BATCH),
        )


def _unless_finite(
    metrics: dict[str, jax.Array], new: TrainState, old: TrainState
) -> tuple[TrainState, jax.Array]:
    """The state after a step, and whether the step is skipped: 1 or 0.

    As `optax.apply_if_finite`, for the buffers too, and without a counter in the state:
    so a checkpoint can be read with the option and without.
    """
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, old)
    return kept._replace(step=new.step), 1 - is_finite.astype(jnp.int32)
