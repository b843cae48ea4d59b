"""A training run of seconds: the smallest model that learns, on two virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dualpipe_jax import PipelineParams
from dualpipe_jax.train import OptimizerConfig, PipelineModel, TrainConfig

NUM_TOKENS = 256


class Toy(PipelineModel):
    """Bytes to bytes: an embedding, one nonlinear layer a stage, and a matrix."""

    vocab_size = NUM_TOKENS

    def __init__(self, width, num_stages):
        self.width, self.num_stages = width, num_stages

    def init(self, key):
        keys = jax.random.split(key, 3)
        square = (self.num_stages, self.width, self.width)
        return PipelineParams(
            stages={
                "kernel": 0.3 * jax.random.normal(keys[0], square),
                "scale": jnp.ones(square[:2]),
            },
            embed=jax.random.normal(keys[1], (NUM_TOKENS, self.width)),
            head=0.1 * jax.random.normal(keys[2], (self.width, NUM_TOKENS)),
        )

    def embed(self, params, tokens):
        return params[tokens]

    def stage(self, params, x):
        return x + params["scale"][None, None] * jnp.tanh(x @ params["kernel"])

    def loss(self, params, x, targets):
        return optax.softmax_cross_entropy_with_integer_labels(
            x @ params, targets
        ).mean()


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int

    def build(self, schedule, mesh, *, microbatch_size, sequence_length):
        return Toy(self.width, schedule.num_stages)


def config() -> TrainConfig:
    """Eight steps of a two-stage model; compiles in seconds."""
    return TrainConfig(
        name="tiny",
        model=ToyConfig(width=16),
        mesh={"pp": 2},
        schedule="dualpipe",
        num_microbatches=4,
        microbatch_size=2,
        sequence_length=16,
        num_steps=8,
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=2),
        eval_every=4,
        checkpoint_every=3,
    )
