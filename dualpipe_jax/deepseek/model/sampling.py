"""A few tokens from a model in training: the whole context again for each of them.

On one device and without a cache, to see what a small model has learnt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax.deepseek.model.balancing import RouterState
from dualpipe_jax.executor import PipelineParams
from dualpipe_jax.train import PipelineModel, on_host

TEMPERATURE = 0.7


def sample(
    single: Any,
    model: PipelineModel,
    params: PipelineParams,
    buffers: RouterState,
    prompt: np.ndarray,
    num_tokens: int,
) -> np.ndarray:
    """Continues a prompt.

    Args:
      single: the `DeepSeekPipeline` of one stage on one device.
      model: the one that `params` belongs to.
      params: on any mesh.
      buffers: of the same step.
      prompt: [n] int32; the model sees the last n tokens whatever it has written.
      num_tokens: how many to write.

    Returns:
      [num_tokens] int32; the same for the same arguments.
    """
    here = jax.local_devices()[0]
    params, bias = on_host((params, buffers.bias))
    params, bias = jax.device_put((single.convert_params(params, model), bias), here)
    buffers = buffers._replace(bias=bias, loads=(), placement=())

    @jax.jit
    def write(params: PipelineParams, prompt: jax.Array, key: jax.Array) -> jax.Array:
        prepared = single.prepare_params(params, buffers)
        stage = jax.tree.map(lambda leaf: leaf[0], prepared.stages)

        def step(context: jax.Array, key: jax.Array):
            x = single.embed(prepared.embed, context[None])
            x, _ = single.stage(stage, x)
            logits = single.logits(prepared.embed, prepared.head, x)[0, -1]
            token = jax.random.categorical(key, logits / TEMPERATURE).astype(jnp.int32)
            return jnp.concatenate([context[1:], token[None]]), token

        _, tokens = lax.scan(step, prompt, jax.random.split(key, num_tokens))
        return tokens

    key = jax.random.key(0)
    return np.asarray(write(params, jnp.asarray(prompt, jnp.int32), key))
