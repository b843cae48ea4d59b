"""The jitted programs of a run: initial state, pipelined train step, held-out loss."""

from __future__ import annotations

import dataclasses
import functools
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
from dualpipe_jax.train.mesh import BATCH, DATA_AXES, make_mesh
from dualpipe_jax.train.model import PipelineModel
from dualpipe_jax.train.optimizer import learning_rate, make_optimizer, num_updates
from dualpipe_jax.train.programs import Programs
from dualpipe_jax.train.state import TrainState, abstract_state, rest_specs

P = PartitionSpec


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
    layout: dict[str, Any] = {
        "schedule": schedule,
        "mesh": mesh,
        "axis_name": "pp",
        "embed_fn": model.embed,
        "data_axes": DATA_AXES,
        "param_specs": model.prepared_specs or model.param_specs,
        "overlap": config.overlap,
    }
    builder = _Builder(
        config=config,
        schedule=schedule,
        mesh=mesh,
        model=model,
        optimizer=make_optimizer(config.optimizer, config.num_steps),
        value_and_grad=pipeline_value_and_grad(
            model.stage_fns, model.loss, tied=model.tied, **layout
        ),
        forward=pipeline_forward(model.stage_fns, **layout),
    )
    return builder.programs()


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
      optimizer: of the parameters as the model lays them out.
      value_and_grad: the pipeline's, from prepared parameters and a batch.
      forward: the pipeline's outputs of the last stage, for evaluation.
    """

    config: TrainConfig
    schedule: Schedule
    mesh: Mesh
    model: PipelineModel
    optimizer: optax.GradientTransformation
    value_and_grad: Any
    forward: Any

    def programs(self) -> Programs:
        """The functions, jitted."""
        shardings = self.shardings
        return Programs(
            schedule=self.schedule,
            mesh=self.mesh,
            abstract_state=self.abstract_state,
            abstract_tokens=self.abstract_tokens,
            init=jax.jit(
                functools.partial(self.init_with, self.model), out_shardings=shardings
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
            restore_plan=self.restore_plan,
            sample=self.sample if self.config.sample_tokens else None,
            grad_names=tuple(names_of(self.abstract_state.params)),
            vocab_size=self.model.vocab_size,
            description=self.model.description,
        )

    # The step, and the loss on text that is held out.

    def train_step(
        self, state: TrainState, inputs: jax.Array, targets: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step: the next state, and what to log."""
        model, config = self.model, self.config
        prepared = model.prepare_params(state.params, state.buffers)
        grads: Any
        (losses, aux), grads = self.value_and_grad(prepared, inputs, targets)
        grads = model.unprepare_grads(grads, state.buffers)
        step = state.step + 1
        # optax mixes floats with its int32 counts; all else here is strict.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.optimizer.update(
                grads, state.opt_state, state.params
            )
            count = num_updates(state.opt_state)
            rate = learning_rate(config.optimizer, config.num_steps)(count + 1)
        params = optax.apply_updates(state.params, updates)
        buffers, observed = model.observe(state.buffers, aux, step)
        metrics = {
            "loss": losses.mean(),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate,
        }
        new = TrainState(step, params, opt_state, buffers)
        if config.max_skipped_steps:
            new, metrics["skipped"] = _unless_finite(metrics, new, state)
        # The sums of which `grad_norm` is made.
        norms = [optax.tree.norm(leaf, squared=True) for leaf in jax.tree.leaves(grads)]
        metrics["grads_finite"] = jnp.isfinite(jnp.stack(norms))
        return new, metrics | observed

    def held_out_loss(
        self, state: TrainState, inputs: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """The mean loss of a batch, without a backward pass."""
        prepared = self.model.prepare_params(state.params, state.buffers)
        outputs = self.forward(prepared, inputs)

        def mean_loss(embed, head, outputs, targets):
            losses = jax.lax.map(
                lambda batch: self.model.evaluate(embed, head, *batch),
                (outputs, targets),
            )
            return jax.lax.pmean(losses.mean(), DATA_AXES)

        specs = self.model.prepared_specs or self.model.param_specs
        evaluate = jax.shard_map(
            mean_loss,
            mesh=self.mesh,
            in_specs=(specs.embed or P(), specs.head or P(), BATCH, BATCH),
            out_specs=P(),
            check_vma=False,
        )
        return evaluate(prepared.embed, prepared.head, outputs, targets)

    def sample(self, state: TrainState, prompt: np.ndarray) -> np.ndarray:
        """New tokens after a prompt."""
        return self.model.sample(
            state.params, state.buffers, prompt, self.config.sample_tokens
        )

    def about_step(self, method: str) -> Any:
        """What a method of the train step's pipelined part reports about it."""
        state, tokens = self.abstract_state, self.abstract_tokens
        prepared = jax.eval_shape(
            self.model.prepare_params, state.params, state.buffers
        )
        return getattr(self.value_and_grad, method)(prepared, tokens, tokens)

    # States: the first one, their shapes, and those of checkpoints.

    def init_with(self, model: PipelineModel) -> TrainState:
        """The state before the first step, for this model in one of its layouts."""
        params: Any = model.init(jax.random.key(self.config.seed))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            buffers=model.init_buffers(),
        )

    def abstract_with(self, model: PipelineModel) -> TrainState:
        """Shapes and shardings of `init_with`."""
        state = jax.eval_shape(functools.partial(self.init_with, model))
        specs = rest_specs(
            state.params, model.param_specs, self.mesh, self.config.shard_at_rest
        )
        return abstract_state(state, specs, self.optimizer, self.mesh)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        return self.abstract_with(self.model)

    @functools.cached_property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @property
    def abstract_tokens(self) -> jax.ShapeDtypeStruct:
        c = self.config
        return jax.ShapeDtypeStruct(
            (c.num_microbatches, c.microbatch_size, c.sequence_length),
            np.int32,
            sharding=NamedSharding(self.mesh, BATCH),
        )

    def restore_plan(
        self, info: dict[str, Any]
    ) -> tuple[TrainState, Callable[[TrainState], TrainState]]:
        """How to read a checkpoint; see `Programs`."""
        model = self.model
        old = model.from_checkpoint_info(info)
        saved = self.abstract_with(old)

        def convert(state: TrainState) -> TrainState:
            # Parameters, and what the optimizer keeps for each of them.
            params, opt_state = jax.tree.map(
                lambda tree: (
                    model.convert_params(tree, old) if _is_params(tree) else tree
                ),
                (state.params, state.opt_state),
                is_leaf=_is_params,
            )
            buffers = model.convert_buffers(state.buffers, old)
            return TrainState(state.step, params, opt_state, buffers)

        mine = model.checkpoint_info
        if mine == {name: info.get(name) for name in mine}:
            return saved, lambda state: state
        return saved, jax.jit(convert, out_shardings=self.shardings)


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


def _is_params(node: Any) -> bool:
    return isinstance(node, PipelineParams)
