"""The jitted programs of a run: initial state, pipelined train step, held-out loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualpipe_jax.executor import (
    PipelineBuffers,
    PipelineParams,
    pipeline_forward,
    pipeline_value_and_grad,
)
from dualpipe_jax.gpu.overlap import compile_for, options_here
from dualpipe_jax.schedules import Schedule
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.mesh import BATCH, DATA_AXES, make_mesh
from dualpipe_jax.train.model import PipelineModel
from dualpipe_jax.train.optimizer import learning_rate, make_optimizer
from dualpipe_jax.train.state import TrainState, abstract_state, rest_specs

P = PartitionSpec
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """A run's jitted programs.

    `init`, `train_step` and `held_out_loss` are jitted functions; those that `compile`
    returns are compiled.

    Attributes:
      schedule: what the pipeline runs.
      mesh: the devices.
      abstract_state: shapes and shardings of the state, to restore one into.
      abstract_tokens: the same of a batch's inputs, and of its targets.
      init: () -> TrainState.
      train_step: (state, inputs, targets) -> (state, metrics); takes the state's
        buffers for its result.
      held_out_loss: (state, inputs, targets) -> mean loss.
      buffers: () -> what the train step keeps on one device from tick to tick.
      lower_costliest_task: () -> its costliest task alone, lowered; see `PipelineStep`.
      checkpoint_info: what a checkpoint says of the model and its layout; JSON.
      restore_plan: `checkpoint_info` of the programs that wrote a checkpoint ->
        (the abstract state to read, the function from that to this run's state). It
        raises ValueError for another model.
      sample: (state, prompt tokens [n] int32) -> new tokens, or None.
      vocab_size: see `PipelineModel`.
      description: see `PipelineModel`.
      compiled: the train step as XLA has compiled it; None before `compile`.
    """

    schedule: Schedule
    mesh: Mesh
    abstract_state: TrainState
    abstract_tokens: jax.ShapeDtypeStruct
    init: Any
    train_step: Any
    held_out_loss: Any
    buffers: Callable[[], PipelineBuffers]
    lower_costliest_task: Callable[[], Any]
    checkpoint_info: dict[str, Any]
    restore_plan: Callable[[dict[str, Any]], tuple[TrainState, Callable]]
    sample: Callable[..., np.ndarray] | None
    vocab_size: int | None
    description: str
    compiled: jax.stages.Compiled | None = None

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Raises a ValueError for tokens that the model does not know."""
        if self.vocab_size is not None and tokens.max() >= self.vocab_size:
            raise ValueError(
                f"the data holds token {tokens.max()}, but the model's vocab_size is "
                f"{self.vocab_size}; give it data of its own vocabulary."
            )

    def compile(self) -> Programs:
        """The same, compiled ahead of the first step; nothing compiles after that."""
        tokens = self.abstract_tokens
        args = (self.abstract_state, tokens, tokens)
        # Drawing random bits takes little time however they are compiled, but
        # optimizing the code for it takes much: as much as a train step's.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        quick = {"xla_backend_optimization_level": 0} if on_cpu else {}
        options = {} if on_cpu else options_here()
        lowered = [
            jitted.lower(*args) for jitted in (self.train_step, self.held_out_loss)
        ]
        # XLA's passes run in one thread each; three programs use more.
        with futures.ThreadPoolExecutor() as pool:
            running = [
                pool.submit(compile_for, lowered[0], self.mesh),
                pool.submit(lowered[1].compile, options),
                pool.submit(self.init.lower().compile, {**options, **quick}),
            ]
            train_step, held_out_loss, init = (each.result() for each in running)
        return dataclasses.replace(
            self,
            train_step=self._taking_whole_batches(train_step),
            held_out_loss=self._taking_whole_batches(held_out_loss),
            init=init,
            compiled=train_step,
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


def make_programs(config: TrainConfig, mesh: Mesh | None = None) -> Programs:
    """Builds everything that a run calls; nothing is compiled yet.

    Args:
      config: the run.
      mesh: the devices, with the axes pp, dp and ep in the config's sizes; by default
        the first ones that jax has. Those of `gpu_mesh` serve to compile for GPUs.

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

    def init_with(model: PipelineModel) -> TrainState:
        params: Any = model.init(jax.random.key(config.seed))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            buffers=model.init_buffers(),
        )

    def abstract_with(model: PipelineModel) -> TrainState:
        state = jax.eval_shape(functools.partial(init_with, model))
        specs = rest_specs(state.params, model.param_specs, mesh, config.shard_at_rest)
        return abstract_state(state, specs, optimizer, mesh)

    prepared_specs = model.prepared_specs or model.param_specs
    layout: dict[str, Any] = {
        "schedule": schedule,
        "mesh": mesh,
        "axis_name": "pp",
        "embed_fn": model.embed,
        "data_axes": DATA_AXES,
        "param_specs": prepared_specs,
        "overlap": config.overlap,
    }
    value_and_grad = pipeline_value_and_grad(
        model.stage_fns, model.loss, tied=model.tied, **layout
    )
    forward = pipeline_forward(model.stage_fns, **layout)

    def train_step(state: TrainState, inputs: jax.Array, targets: jax.Array):
        prepared = model.prepare_params(state.params, state.buffers)
        grads: Any
        (losses, aux), grads = value_and_grad(prepared, inputs, targets)
        grads = model.unprepare_grads(grads, state.buffers)
        step = state.step + 1
        # optax mixes floats with its int32 counts; all else here is strict.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            rate = learning_rate(config.optimizer, config.num_steps)(step)
        params = optax.apply_updates(state.params, updates)
        buffers, observed = model.observe(state.buffers, aux, step)
        metrics = {
            "loss": losses.mean(),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate,
        }
        return TrainState(step, params, opt_state, buffers), metrics | observed

    def held_out_loss(state: TrainState, inputs: jax.Array, targets: jax.Array):
        prepared = model.prepare_params(state.params, state.buffers)
        outputs = forward(prepared, inputs)

        def mean_loss(embed, head, outputs, targets):
            losses = jax.lax.map(
                lambda batch: model.evaluate(embed, head, *batch), (outputs, targets)
            )
            return jax.lax.pmean(losses.mean(), DATA_AXES)

        evaluate = jax.shard_map(
            mean_loss,
            mesh=mesh,
            in_specs=(
                prepared_specs.embed or P(),
                prepared_specs.head or P(),
                BATCH,
                BATCH,
            ),
            out_specs=P(),
            check_vma=False,
        )
        return evaluate(prepared.embed, prepared.head, outputs, targets)

    def about_step(method: str) -> Any:
        """What a method of the train step's pipelined part tells of it."""
        prepared = jax.eval_shape(
            model.prepare_params, abstract.params, abstract.buffers
        )
        return getattr(value_and_grad, method)(prepared, tokens, tokens)

    abstract = abstract_with(model)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def restore_plan(info: dict[str, Any]):
        old = model.from_checkpoint_info(info)
        saved = abstract_with(old)

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
        return saved, jax.jit(convert, out_shardings=shardings)

    def sample(state: TrainState, prompt: np.ndarray) -> np.ndarray:
        return model.sample(state.params, state.buffers, prompt, config.sample_tokens)

    tokens = jax.ShapeDtypeStruct(
        (config.num_microbatches, config.microbatch_size, config.sequence_length),
        np.int32,
        sharding=NamedSharding(mesh, BATCH),
    )
    return Programs(
        schedule=schedule,
        mesh=mesh,
        abstract_state=abstract,
        abstract_tokens=tokens,
        init=jax.jit(functools.partial(init_with, model), out_shardings=shardings),
        train_step=jax.jit(
            train_step,
            donate_argnums=0,
            # Every process reads the metrics, those with an axis too.
            out_shardings=(shardings, NamedSharding(mesh, P())),
        ),
        held_out_loss=jax.jit(held_out_loss),
        buffers=functools.partial(about_step, "buffers"),
        lower_costliest_task=functools.partial(about_step, "lower_costliest_task"),
        checkpoint_info=model.checkpoint_info,
        restore_plan=restore_plan,
        sample=sample if config.sample_tokens else None,
        vocab_size=model.vocab_size,
        description=model.description,
    )


def lower_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The train step of a config, lowered for the devices of a mesh."""
    programs = make_programs(config, mesh)
    tokens = programs.abstract_tokens
    return programs.train_step.lower(programs.abstract_state, tokens, tokens)


def _is_params(node: Any) -> bool:
    return isinstance(node, PipelineParams)
