"""The smallest model with every part, and its training without a pipeline."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig, EplbConfig
from dualpipe_jax.executor import PipelineAux
from dualpipe_jax.train import OptimizerConfig, TrainConfig
from dualpipe_jax.train.optimizer import make_optimizer

ARCHITECTURE = DeepSeekConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=32,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    moe_intermediate_size=16,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    initializer_range=0.1,
)


def config(*, architecture=(), model=(), **changes) -> TrainConfig:
    """Three layers on two ranks, so one has padding; experts are replicated."""
    sizes = dataclasses.replace(ARCHITECTURE, **dict(architecture))
    training = {
        "eplb": EplbConfig(every=2, num_redundant=2),
        "balance_loss": 1e-2,  # large enough to be seen in the gradients
        "z_loss": 1e-3,
    }
    fields = {
        "name": "small",
        "model": DeepSeek(architecture=sizes, **training | dict(model)),
        "mesh": {"pp": 2, "ep": 2},
        "schedule": "dualpipe",
        "num_microbatches": 4,
        "microbatch_size": 4,
        "sequence_length": 8,
        "num_steps": 20,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    }
    return TrainConfig(**fields | changes)


def batch(config, step):
    """Tokens of the lower half of the vocabulary, so that there is a lot to learn."""
    size = (config.num_microbatches, config.microbatch_size, config.sequence_length + 1)
    tokens = np.random.default_rng(step).integers(0, 16, size).astype(np.int32)
    return tokens[..., :-1], tokens[..., 1:]


def initial_state(config, model, programs):
    """What `programs.init` gives, from parameters that are drawn once for all tests."""
    single = config.model.build_unpipelined()
    abstract = programs.abstract_state

    def make(params):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
        params = model.convert_params(params, single)
        return zeros._replace(params=params, buffers=model.init_buffers())

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = single_params(config.model.architecture)
    return jax.jit(make, out_shardings=shardings)(params)


@functools.cache
def single_params(architecture):
    """First parameters of the model as one stage; no layout changes them."""
    init = DeepSeek(architecture=architecture).build_unpipelined().init
    return jax.device_get(jax.jit(init)(jax.random.key(0)))


def unpipelined_steps(config, num_steps):
    """The metrics of each step of the same model on one device, by `jax.grad` alone.

    Args:
      config: mesh, schedule, EPLB and exact balance make no difference.
      num_steps: how many steps.
    """
    placed = {"balance": "placement", "num_fetched": 0, "spread_shared": False}
    model = dataclasses.replace(config.model, eplb=None, **placed)
    return _unpipelined_steps(model, config.num_microbatches, num_steps)


@functools.cache
def _unpipelined_steps(model_config, count, num_steps):
    model = model_config.build_unpipelined(num_microbatches=count)
    of_run = config(num_microbatches=count)
    optimizer = make_optimizer(of_run.optimizer, of_run.num_steps)

    def loss_of_all(params, buffers, inputs, targets):
        prepared = model.prepare_params(params, buffers)
        stage = jax.tree.map(lambda leaf: leaf[0], prepared.stages)
        outer = (prepared.embed, prepared.head) if model.tied else prepared.head

        def loss_of_one(batch):
            x, aux = model.stage(stage, model.embed(prepared.embed, batch[0]))
            loss, loss_aux = model.loss(outer, x, batch[1])
            return loss, PipelineAux(aux, loss_aux)

        losses, aux = jax.lax.map(loss_of_one, (inputs, targets))
        return losses.mean(), jax.tree.map(lambda leaf: leaf.sum(axis=0), aux)

    @jax.jit
    def step(params, opt_state, buffers, inputs, targets, number):
        grad = jax.grad(loss_of_all, has_aux=True)
        grads, aux = grad(params, buffers, inputs, targets)
        with jax.numpy_dtype_promotion("standard"):  # optax: floats and int counts
            updates, opt_state = optimizer.update(grads, opt_state, params)
        stages = jax.tree.map(lambda leaf: leaf[None], aux.stages)
        aux = PipelineAux(stages, aux.loss)
        buffers, metrics = model.observe(buffers, aux, number)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return optax.apply_updates(params, updates), opt_state, buffers, metrics

    params, record = single_params(model_config.architecture), []
    state = (params, optimizer.init(params), model.init_buffers())
    step = step.lower(*state, *batch(of_run, 0), np.int32(1)).compile()
    for number in range(num_steps):
        *state, metrics = step(*state, *batch(of_run, number), np.int32(number + 1))
        record.append({k: np.asarray(value).tolist() for k, value in metrics.items()})
    return record
