"""What a train step reads and writes, and how it lies on the mesh between steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualpipe_jax.executor import PipelineParams, map_specs
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.mesh import DATA_AXES
from dualpipe_jax.train.model import PipelineModel
from dualpipe_jax.train.trained import filled, trained_flags

P = PartitionSpec
# Elements; gathering a smaller array is not worth a collective.
_SMALL = 2**14


class TrainState(NamedTuple):
    """What a step reads and writes, and what a checkpoint holds.

    The fields are typed Any: the same tree also holds shapes or shardings, which
    optax's types do not allow for.

    Attributes:
      step: [] int32, optimizer steps done.
      params: `PipelineParams`; stages lie on the rank that runs them.
      opt_state: optax's, of the parameters that are trained, laid out as they are.
      buffers: what the model changes beside its parameters.
    """

    step: Any
    params: Any
    opt_state: Any
    buffers: Any


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
      One `PartitionSpec` per parameter, the stage axis included. A mesh axis that does
      not divide the dimension that it should split is left out: checkpoints of other
      meshes have stages and experts that this one cannot share evenly.
    """
    return map_specs(
        lambda spec, leaf: _fit(spec, leaf.shape, mesh, shard_at_rest),
        specs,
        params,
        axis_name="pp",
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
    trainable: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Shapes and shardings: the optimizer's are the parameters', the rest is whole."""
    flags = trained_flags(trainable, state.params)
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
        params.partition(flags)[0],
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


@dataclasses.dataclass(frozen=True, eq=False)
class States:
    """The states of a run: the first one, their shapes, and those of checkpoints.

    Attributes:
      config: the run.
      model: laid over the schedule's stages on the mesh.
      optimizer: of the parameters.
      mesh: the devices.
    """

    config: TrainConfig
    model: PipelineModel
    optimizer: optax.GradientTransformation
    mesh: Mesh

    def split(self, params: PipelineParams) -> tuple[Any, Any]:
        """(trained, frozen) parameters, each with None at the other's leaves."""
        return params.partition(trained_flags(self.config.trainable, params))

    def trained(self, params: PipelineParams) -> Any:
        """The trained ones only."""
        return self.split(params)[0]

    def init_with(self, model: PipelineModel) -> TrainState:
        """The state before the first step, for this model in one of its layouts."""
        params: Any = model.init(jax.random.key(self.config.seed))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(self.trained(params)),
            buffers=model.init_buffers(),
        )

    def abstract_with(self, model: PipelineModel) -> TrainState:
        """Shapes and shardings of `init_with`."""
        state = jax.eval_shape(functools.partial(self.init_with, model))
        specs = rest_specs(
            state.params, model.param_specs, self.mesh, self.config.shard_at_rest
        )
        return abstract_state(
            state, specs, self.config.trainable, self.optimizer, self.mesh
        )

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes and shardings of the run's states."""
        return self.abstract_with(self.model)

    @functools.cached_property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def restore_plan(
        self, info: dict[str, Any]
    ) -> tuple[TrainState, Callable[[TrainState], TrainState]]:
        """How to read a checkpoint; see `Programs`."""
        model = self.model
        old = model.from_checkpoint_info(info)
        saved = self.abstract_with(old)

        def convert_trained(tree: Any) -> Any:
            """What the optimizer keeps for each parameter."""
            if not isinstance(tree, PipelineParams):
                return tree
            whole = model.convert_params(filled(tree, saved.params), old)
            return self.trained(whole)

        def convert(state: TrainState) -> TrainState:
            return TrainState(
                step=state.step,
                params=model.convert_params(state.params, old),
                opt_state=jax.tree.map(
                    convert_trained,
                    state.opt_state,
                    is_leaf=lambda node: isinstance(node, PipelineParams),
                ),
                buffers=model.convert_buffers(state.buffers, old),
            )

        mine = model.checkpoint_info
        if mine == {name: info.get(name) for name in mine}:
            return saved, lambda state: state
        return saved, jax.jit(convert, out_shardings=self.shardings)
