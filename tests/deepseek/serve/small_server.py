"""A server on 8 devices that compiles in seconds, with weights that matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax.deepseek import DeepSeek
from dualpipe_jax.deepseek.serve import Engine, RebalanceConfig, ServeConfig
from dualpipe_jax.deepseek.serve.weights import trained_params
from tests.deepseek.model.small import ARCHITECTURE, single_params

# Large initial values, so that attention and experts decide which tokens follow.
SIZES = dataclasses.replace(
    ARCHITECTURE,
    n_routed_experts=16,
    n_group=1,
    topk_group=1,
    num_hidden_layers=3,
    initializer_range=0.3,
)
OFTEN = RebalanceConfig(every=2, below=1, min_gain=0, max_moves=3, layers_per_plan=1)


def config(**changes) -> ServeConfig:
    fields = {
        "name": "small",
        "architecture": SIZES,
        "num_devices": 8,
        "num_redundant": 8,
        "requests_per_device": 2,
        "context_length": 224,
        "max_prompt_length": 10,
        "prompts_per_device": 4,
        "max_prefill_tokens": 14,
        "rebalance": OFTEN,
    }
    return ServeConfig(**fields | changes)


def params(config):
    model = DeepSeek(architecture=config.architecture).build_unpipelined()
    shape = (config.architecture.num_moe_layers, config.architecture.n_routed_experts)
    # Some experts are wanted much more than others.
    bias = np.random.default_rng(0).normal(size=shape, scale=0.3).astype(np.float32)
    of = functools.partial(trained_params, config, model)
    return jax.jit(of)(single_params(config.architecture), bias), bias


def engine(config) -> Engine:
    return Engine(config, params(config)[0])


def prompts(count, config, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, config.max_prompt_length + 1, count)
    return [rng.integers(0, config.architecture.vocab_size, n) for n in lengths]


def reference(config, bias):
    """Greedy completions by the training model: all of the sequence for each token."""
    sizes = {"architecture": config.architecture, "products": config.products}
    model = DeepSeek(**sizes).build_unpipelined()
    buffers = model.init_buffers()._replace(bias=jnp.asarray(bias))
    weights = single_params(config.architecture)

    @jax.jit
    def next_token(weights, tokens, length):
        prepared = model.prepare_params(weights, buffers)
        x = model.embed(prepared.embed, tokens[None])
        x, _ = model.stage(jax.tree.map(lambda leaf: leaf[0], prepared.stages), x)
        logits = model.logits(prepared.embed, prepared.head, x)[0]
        return jnp.argmax(logits[length - 1]).astype(jnp.int32)

    def complete(prompt, num_tokens):
        tokens = np.zeros(config.context_length, np.int32)
        tokens[: len(prompt)] = prompt
        for length in range(len(prompt), len(prompt) + num_tokens):
            tokens[length] = next_token(weights, tokens, np.int32(length))
        return tokens[len(prompt) : len(prompt) + num_tokens]

    return complete
