"""A few tokens from a model in training, to see what it has learned.

It runs on one device and without a cache: each token computes the whole context again.
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
    state: RouterState,
    prompt: np.ndarray,
    num_tokens: int,
) -> np.ndarray:
    """Continues a prompt.

    Args:
      single: the `DeepSeekPipeline` of one stage on one device.
      model: the model that `params` belongs to.
      params: on any mesh.
      state: of the same step.
      prompt: [n] int32; the context is always the last n tokens.
      num_tokens: how many tokens to generate.

    Returns:
      [num_tokens] int32; the same for the same arguments.
    """
    here = jax.local_devices()[0]
    params, bias = on_host((params, state.bias))
    params, bias = jax.device_put((single.convert_params(params, model), bias), here)
    state = state._replace(bias=bias, loads=(), placement=())

    @jax.jit
    def write(params: PipelineParams, prompt: jax.Array, key: jax.Array) -> jax.Array:
        prepared = single.prepare_params(params, state)
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
