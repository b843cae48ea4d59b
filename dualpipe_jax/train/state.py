"""What a train step reads and writes, and how it lies on the mesh between steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualpipe_jax.executor import PipelineParams, map_specs
from dualpipe_jax.train.mesh import DATA_AXES

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
      opt_state: optax's, laid out as the parameters are.
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
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Shapes and shardings: the optimizer's are the parameters', the rest is whole."""
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
