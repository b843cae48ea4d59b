"""Runs a lowered schedule: one jitted step inside `jax.shard_map`.

A step's call chain: `pipeline` (the public functions), `model` (parameters and buffers
of one device), `work` (the user's functions as the work of a tick), `runner` (the
ticks).

Imports: schedules, lowering, backward, eplb_jax.runtime.
"""

from dualpipe_jax.executor.footprint import BufferBytes, num_bytes as num_bytes
from dualpipe_jax.executor.keys import takes_key as takes_key, with_key as with_key
from dualpipe_jax.executor.losses import Weighted, divide_or_zero as divide_or_zero
from dualpipe_jax.executor.params import (
    PipelineAux,
    PipelineParams,
    microbatch_key,
    stack_stages,
)
from dualpipe_jax.executor.pipeline import (
    PipelineForward,
    PipelineStep,
    pipeline_forward,
    pipeline_value_and_grad,
)
from dualpipe_jax.executor.specs import map_specs as map_specs
from dualpipe_jax.executor.trainable import check_choice as check_choice

__all__ = [
    "BufferBytes",
    "PipelineAux",
    "PipelineForward",
    "PipelineParams",
    "PipelineStep",
    "Weighted",
    "microbatch_key",
    "pipeline_forward",
    "pipeline_value_and_grad",
    "stack_stages",
]
