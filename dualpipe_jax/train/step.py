"""The jitted programs of a run: initial state, pipelined train step, held-out loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax._src import distributed
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dualpipe_jax.pipeline import (
    PipelineParams,
    pipeline_forward,
    pipeline_value_and_grad,
)
from dualpipe_jax.schedule import Schedule
from dualpipe_jax.train.config import OptimizerConfig, TrainConfig
from dualpipe_jax.train.model import PipelineModel

P = PartitionSpec
PyTree = Any

# Of the mesh: both split each microbatch.
DATA_AXES = ("dp", "ep")
BATCH = P(None, DATA_AXES)
# Elements; what is smaller is not worth a collective of its own.
_SMALL = 2**14


class TrainState(NamedTuple):
    """What a step reads and writes, and what a checkpoint holds.

    The fields are typed Any: the same tree also holds shapes or shardings, and
    optax's types know no pytrees of others.

    Attributes:
      step: [] int32, optimizer steps done.
      params: `PipelineParams`; stages lie on the rank that runs them.
      opt_state: optax's, laid out as the parameters are.
      buffers: what the model changes beside its parameters.
    """

    step: Any
    params: Any
    opt_state: Any
    buffers: Any


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
      checkpoint_info: what a checkpoint says of the model and its layout; JSON.
      restore_plan: `checkpoint_info` of the programs that wrote a checkpoint ->
        (the abstract state to read, the function from that to this run's state). It
        raises ValueError for another model.
      sample: (state, prompt tokens [n] int32) -> new tokens, or None.
      vocab_size: see `PipelineModel`.
      description: see `PipelineModel`.
    """

    schedule: Schedule
    mesh: Mesh
    abstract_state: TrainState
    abstract_tokens: jax.ShapeDtypeStruct
    init: Any
    train_step: Any
    held_out_loss: Any
    checkpoint_info: dict[str, Any]
    restore_plan: Callable[[dict[str, Any]], tuple[TrainState, Callable]]
    sample: Callable[..., np.ndarray] | None
    vocab_size: int | None
    description: str

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
        quick = {"xla_backend_optimization_level": 0} if _is_on_cpu(self.mesh) else {}
        lowered = [
            (self.train_step.lower(*args), {}),
            (self.held_out_loss.lower(*args), {}),
            (self.init.lower(), quick),
        ]
        # XLA's passes run in one thread each; three programs use more.
        with futures.ThreadPoolExecutor() as pool:
            train_step, held_out_loss, init = pool.map(
                lambda program: program[0].compile(program[1]), lowered
            )
        return dataclasses.replace(
            self,
            train_step=self._taking_whole_batches(train_step),
            held_out_loss=self._taking_whole_batches(held_out_loss),
            init=init,
        )

    def _taking_whole_batches(self, compiled: Any) -> Any:
        """Each process has the whole batch, and gives its devices their parts of it."""
        tokens = self.abstract_tokens

        def call(state: TrainState, *batch: np.ndarray) -> Any:
            self.check_tokens(batch[-1])
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

    bound_specs = model.bound_specs or model.param_specs
    layout: dict[str, Any] = {
        "schedule": schedule,
        "mesh": mesh,
        "axis_name": "pp",
        "embed_fn": model.embed,
        "data_axes": DATA_AXES,
        "param_specs": bound_specs,
    }
    value_and_grad = pipeline_value_and_grad(
        model.stage, model.loss, tied=model.tied, **layout
    )
    forward = pipeline_forward(model.stage, **layout)

    def train_step(state: TrainState, inputs: jax.Array, targets: jax.Array):
        bound = model.bind(state.params, state.buffers)
        grads: Any
        (losses, aux), grads = value_and_grad(bound, inputs, targets)
        grads = model.unbind(grads, state.buffers)
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
        bound = model.bind(state.params, state.buffers)
        outputs = forward(bound, inputs)

        def mean_loss(embed, head, outputs, targets):
            losses = jax.lax.map(
                lambda batch: model.evaluate(embed, head, *batch), (outputs, targets)
            )
            return jax.lax.pmean(losses.mean(), DATA_AXES)

        evaluate = jax.shard_map(
            mean_loss,
            mesh=mesh,
            in_specs=(bound_specs.embed or P(), bound_specs.head or P(), BATCH, BATCH),
            out_specs=P(),
            check_vma=False,
        )
        return evaluate(bound.embed, bound.head, outputs, targets)

    abstract = abstract_with(model)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def restore_plan(info: dict[str, Any]):
        old = model.written_by(info)
        saved = abstract_with(old)

        def convert(state: TrainState) -> TrainState:
            # Parameters, and what the optimizer keeps for each of them.
            params, opt_state = jax.tree.map(
                lambda tree: model.take_params(tree, old) if _is_params(tree) else tree,
                (state.params, state.opt_state),
                is_leaf=_is_params,
            )
            buffers = model.take_buffers(state.buffers, old)
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
            train_step, donate_argnums=0, out_shardings=(shardings, None)
        ),
        held_out_loss=jax.jit(held_out_loss),
        checkpoint_info=model.checkpoint_info,
        restore_plan=restore_plan,
        sample=sample if config.sample_tokens else None,
        vocab_size=model.vocab_size,
        description=model.description,
    )


def make_mesh(config: TrainConfig) -> Mesh:
    """The config's mesh over the first devices, virtual ones on a CPU.

    Raises:
      ValueError: there are too few devices, or the processes share them unevenly.
    """
    needed, processes = config.num_devices, _num_processes()
    if needed % processes:
        raise ValueError(
            f"mesh={dict(config.mesh)} needs {needed} devices, which {processes} "
            "processes do not share evenly; start another number of processes."
        )
    # Does what XLA's --xla_force_host_platform_device_count does. Once jax has its
    # devices (in a notebook, say) it refuses, and those must do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", needed // processes)
    if config.platform and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", config.platform)
    if jax.device_count() < needed:
        raise ValueError(
            f"mesh={dict(config.mesh)} needs {needed} devices, but jax has "
            f"{jax.device_count()} ({jax.default_backend()}); use a smaller mesh, or "
            "set JAX_PLATFORMS=cpu before jax starts to train on virtual CPU devices."
        )
    shape = config.mesh_shape
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[:needed],
    )


def rest_specs(
    params: PipelineParams, specs: PipelineParams, mesh: Mesh, shard_at_rest: bool
) -> PipelineParams:
    """How each parameter lies between steps.

    Args:
      params: shapes.
      specs: `PipelineModel.param_specs`.
      mesh: with the axes pp, dp and ep.
      shard_at_rest: see `TrainConfig`.

    Returns:
      One `PartitionSpec` a parameter, the stage axis included. An axis that does not
      divide what it should split is left out: checkpoints of other meshes have stages
      and experts that this one cannot share evenly.
    """

    def full(prefix: PyTree, tree: PyTree, *leading: str) -> PyTree:
        return jax.tree.map(
            lambda spec, part: jax.tree.map(
                lambda leaf: _fit((*leading, *spec), leaf.shape, mesh, shard_at_rest),
                part,
            ),
            P() if prefix is None else prefix,
            tree,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )

    return PipelineParams(
        full(specs.stages, params.stages, "pp"),
        full(specs.embed, params.embed),
        full(specs.head, params.head),
    )


def _fit(spec: tuple, shape: tuple[int, ...], mesh: Mesh, shard_at_rest: bool) -> P:
    axes: list[tuple[str, ...]] = [() for _ in shape]
    for at, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        if shape[at] % math.prod(mesh.shape[name] for name in names) == 0:
            axes[at] = names
    taken = {name for names in axes for name in names}
    rest = tuple(
        name for name in DATA_AXES if name not in taken and mesh.shape[name] > 1
    )
    if shard_at_rest and rest and math.prod(shape) >= _SMALL:
        # The widest free axis: the first one is that of the stages.
        parts = math.prod(mesh.shape[name] for name in rest)
        free = [at for at in range(1, len(shape)) if not axes[at]]
        free = [at for at in free if shape[at] % parts == 0]
        if free:
            axes[max(free, key=lambda at: shape[at])] = rest
    while axes and not axes[-1]:
        axes.pop()
    return P(*(names[0] if len(names) == 1 else names or None for names in axes))


def abstract_state(
    state: TrainState,
    specs: PipelineParams,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Shapes and shardings: the optimizer's as the parameters', the rest everywhere."""
    whole = NamedSharding(mesh, P())
    params = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    buffers = jax.tree.map(lambda _: whole, state.buffers)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        state,
        TrainState(whole, params, opt_state, buffers),
    )


def _is_on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _num_processes() -> int:
    """As `jax.process_count`, which would start the backend with what it has now."""
    return distributed.global_state.num_processes or 1


def _is_params(node: Any) -> bool:
    return isinstance(node, PipelineParams)


def _is_matrix(params: PipelineParams) -> PipelineParams:
    # A stage's leaves have one more axis, that of the stages.
    return PipelineParams(
        stages=jax.tree.map(lambda leaf: leaf.ndim > 2, params.stages),
        embed=jax.tree.map(lambda leaf: leaf.ndim > 1, params.embed),
        head=jax.tree.map(lambda leaf: leaf.ndim > 1, params.head),
    )
