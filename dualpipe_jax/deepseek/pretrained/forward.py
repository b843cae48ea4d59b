"""The logits of a whole batch, through the stages that training uses."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from dualpipe_jax.deepseek.model import DeepSeek, DeepSeekPipeline, RouterState
from dualpipe_jax.executor import PipelineParams, pipeline_forward
from dualpipe_jax.schedules.generators import SCHEDULES
from dualpipe_jax.train import AXES

P = PartitionSpec
# Of the mesh: both split each microbatch.
DATA_AXES = ("dp", "ep")


def complete_mesh(mesh: Mesh | None) -> Mesh:
    """Returns a mesh with the axes pp, dp and ep; those that it lacks have size 1.

    Args:
      mesh: with some of these axes; None: the first device alone.

    Raises:
      ValueError: it has another axis.
    """
    if mesh is None:
        devices = np.array(jax.local_devices()[:1]).reshape(1, 1, 1)
    else:
        if unknown := [name for name in mesh.axis_names if name not in AXES]:
            raise ValueError(
                f"mesh has the axis {unknown[0]!r}; the axes of a model are "
                f"{', '.join(AXES)}."
            )
        order = [mesh.axis_names.index(name) for name in AXES if name in mesh.shape]
        shape = [mesh.shape.get(name, 1) for name in AXES]
        devices = mesh.devices.transpose(order).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def build(options: DeepSeek, mesh: Mesh) -> DeepSeekPipeline:
    """Lays a model over one stage for each rank of a mesh.

    Raises:
      ValueError: it has fewer layers than the mesh has ranks, or its sizes do not fit
        the mesh.
    """
    sequences = mesh.shape["dp"] * mesh.shape["ep"]
    schedule = SCHEDULES["gpipe"](mesh.shape["pp"], 1)
    return options.build(schedule, mesh, microbatch_size=sequences, sequence_length=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def batch_logits(
    model: DeepSeekPipeline,
    mesh: Mesh,
    params: PipelineParams,
    buffers: RouterState,
    tokens: jax.Array,
) -> jax.Array:
    """Returns logits [batch, sequence, vocabulary] float32 of tokens [batch, sequence].

    Args:
      model: from `build`.
      mesh: that it was built for.
      params: of the model.
      buffers: of the model.
      tokens: int32, of any number of sequences.
    """
    ranks, sequences = mesh.shape["pp"], mesh.shape["dp"] * mesh.shape["ep"]
    batch, length = tokens.shape
    # Without other ranks to wait for, all sequences are one microbatch.
    num_microbatches = min(2 * ranks, -(-batch // sequences)) if ranks > 1 else 1
    size = -(-batch // (num_microbatches * sequences)) * sequences
    room = num_microbatches * size - batch
    tokens = jnp.pad(tokens, ((0, room), (0, 0)))
    tokens = tokens.reshape(num_microbatches, size, length)
    specs = model.prepared_specs
    forward = pipeline_forward(
        model.stage_fns,
        schedule=SCHEDULES["gpipe"](ranks, num_microbatches),
        mesh=mesh,
        embed_fn=model.embed,
        data_axes=DATA_AXES,
        param_specs=specs,
    )

    def of_all(embed: Any, head: Any, outputs: jax.Array) -> jax.Array:
        return lax.map(lambda x: model.logits(embed, head, x), outputs)

    prepared = model.prepare_params(params, buffers)
    over = P(None, DATA_AXES)
    logits = jax.shard_map(
        of_all,
        mesh=mesh,
        in_specs=(specs.embed, specs.head, over),
        out_specs=over,
        check_vma=False,
    )(prepared.embed, prepared.head, forward(prepared, tokens))
    return logits.reshape(-1, length, logits.shape[-1])[:batch]
