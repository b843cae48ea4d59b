"""The jitted programs of a run: initial state, pipelined train step, held-out loss."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dualpipe_jax.pipeline import (
    PipelineParams,
    pipeline_forward,
    pipeline_value_and_grad,
)
from dualpipe_jax.schedule import Schedule
from dualpipe_jax.train.config import OptimizerConfig, TrainConfig


class TrainState(NamedTuple):
    """What a step reads and writes, and what a checkpoint holds.

    The fields are typed Any: the same tree also holds shapes or shardings, and
    optax's types know no pytrees of others.

    Attributes:
      step: [] int32, optimizer steps done.
      params: `PipelineParams`; stages lie on the rank that runs them.
      opt_state: optax's, laid out as the parameters are.
    """

    step: Any
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """A run's jitted programs.

    Attributes:
      schedule: what the pipeline runs.
      mesh: the devices.
      abstract_state: shapes and shardings of the state, to restore one into.
      abstract_tokens: the same of a batch's inputs, and of its targets.
      init: () -> TrainState.
      train_step: (state, inputs, targets) -> (state, metrics); takes the state's
        buffers for its result.
      held_out_loss: (params, inputs, targets) -> mean loss.
      checkpoint_info: what a checkpoint says of its layout; JSON.
      sample: (state, prompt tokens [n]) -> new tokens, or None.
    """

    schedule: Schedule
    mesh: Mesh
    abstract_state: TrainState
    abstract_tokens: jax.ShapeDtypeStruct
    init: Callable[[], TrainState]
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    held_out_loss: Callable[..., jax.Array]
    checkpoint_info: dict[str, Any] = dataclasses.field(default_factory=dict)
    sample: Callable[..., np.ndarray] | None = None

    def restore_plan(
        self, info: dict[str, Any]
    ) -> tuple[TrainState, Callable[[TrainState], TrainState]]:
        """How to read a checkpoint: shapes and shardings to read into, and what then.

        Args:
          info: the `checkpoint_info` of the programs that wrote it.

        Returns:
          The abstract state to read, and the function from it to this run's state.

        Raises:
          ValueError: the checkpoint is of another model.
        """
        del info
        return self.abstract_state, lambda state: state

    def compile(self) -> Programs:
        """The same, compiled ahead of the first step; nothing compiles after that."""
        tokens = self.abstract_tokens
        return dataclasses.replace(
            self,
            train_step=_compile(self.train_step, self.abstract_state, tokens),
            held_out_loss=_compile(
                self.held_out_loss, self.abstract_state.params, tokens
            ),
        )


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine decay until `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        # A run that is shorter than its warm-up never reaches the peak.
        decay_steps=max(num_steps, config.warmup_steps + 1),
        end_value=config.final_fraction * config.learning_rate,
    )


def make_optimizer(
    config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
    """AdamW after clipping, as `config` says."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            # The update of step 0 would be empty at the warm-up's first value.
            lambda count: learning_rate(config, num_steps)(count + 1),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def make_programs(config: TrainConfig) -> Programs:
    """Builds everything that a run calls; nothing is compiled yet.

    Raises:
      ValueError: the config fits neither its schedule, its model nor the devices
        that are there.
    """
    mesh = make_mesh(config)
    schedule = config.schedule(config.mesh["pp"], config.num_microbatches)
    fns = config.model.build(schedule.num_stages)
    optimizer = make_optimizer(config.optimizer, config.num_steps)

    def init() -> TrainState:
        params: Any = fns.init(jax.random.key(config.seed))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    layout: dict[str, Any] = {
        "schedule": schedule,
        "mesh": mesh,
        "axis_name": "pp",
        "embed_fn": fns.embed_fn,
        "data_axes": ("dp",),
    }
    value_and_grad = pipeline_value_and_grad(fns.stage_fn, fns.loss_fn, **layout)
    forward = pipeline_forward(fns.stage_fn, **layout)

    def train_step(state: TrainState, inputs: jax.Array, targets: jax.Array):
        grads: Any
        (losses, _), grads = value_and_grad(state.params, inputs, targets)
        step = state.step + 1
        # optax mixes floats with its int32 counts; all else here is strict.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            rate = learning_rate(config.optimizer, config.num_steps)(step)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": losses.mean(),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate,
        }
        return TrainState(step, params, opt_state), metrics

    def held_out_loss(params: PipelineParams, inputs: jax.Array, targets: jax.Array):
        outputs = forward(params, inputs)
        loss_fn = jax.vmap(fns.loss_fn, in_axes=(None, 0, 0))
        return loss_fn(params.head, outputs, targets).mean()

    abstract = jax.eval_shape(init)
    shardings = state_shardings(abstract, optimizer, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract,
        shardings,
    )
    tokens = jax.ShapeDtypeStruct(
        (config.num_microbatches, config.microbatch_size, config.sequence_length),
        np.int32,
        sharding=NamedSharding(mesh, PartitionSpec(None, "dp")),
    )
    return Programs(
        schedule=schedule,
        mesh=mesh,
        abstract_state=abstract,
        abstract_tokens=tokens,
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            train_step, donate_argnums=0, out_shardings=(shardings, None)
        ),
        held_out_loss=jax.jit(held_out_loss),
    )


def make_mesh(config: TrainConfig) -> Mesh:
    """The config's mesh over the first devices, virtual ones on a CPU.

    Raises:
      ValueError: there are too few devices.
    """
    needed = config.num_devices
    # Does what XLA's --xla_force_host_platform_device_count does. Once jax has its
    # devices (in a notebook, say) it refuses, and those must do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", needed)
    if config.platform and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", config.platform)
    if jax.device_count() < needed:
        raise ValueError(
            f"mesh={dict(config.mesh)} needs {needed} devices, but jax has "
            f"{jax.device_count()} ({jax.default_backend()}); use a smaller mesh, or "
            "set JAX_PLATFORMS=cpu before jax starts to train on virtual CPU devices."
        )
    return jax.make_mesh(
        tuple(config.mesh.values()),
        tuple(config.mesh),
        axis_types=(AxisType.Auto,) * len(config.mesh),
        devices=jax.devices()[:needed],
    )


def state_shardings(
    state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Stages, and their optimizer state, split over `pp`; the rest everywhere."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params = PipelineParams(
        stages=jax.tree.map(
            lambda _: NamedSharding(mesh, PartitionSpec("pp")), state.params.stages
        ),
        embed=jax.tree.map(lambda _: replicated, state.params.embed),
        head=jax.tree.map(lambda _: replicated, state.params.head),
    )
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, opt_state)


def _compile(jitted, state, tokens: jax.ShapeDtypeStruct):
    compiled = jitted.lower(state, tokens, tokens).compile()

    def call(state, inputs, targets):
        # A compiled function takes nothing but what it was compiled for.
        inputs, targets = jax.device_put((inputs, targets), tokens.sharding)
        return compiled(state, inputs, targets)

    return call


def _is_matrix(params: PipelineParams) -> PipelineParams:
    # A stage's leaves have one more axis, that of the stages.
    return PipelineParams(
        stages=jax.tree.map(lambda leaf: leaf.ndim > 2, params.stages),
        embed=jax.tree.map(lambda leaf: leaf.ndim > 1, params.embed),
        head=jax.tree.map(lambda leaf: leaf.ndim > 1, params.head),
    )
