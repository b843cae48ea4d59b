"""A training run of seconds, on two of the virtual devices."""

from dualpipe_jax import dualpipe
from dualpipe_jax.train import OptimizerConfig, TrainConfig
from dualpipe_jax.train.model import Transformer


def config() -> TrainConfig:
    """Eight steps of a two-stage model; compiles in seconds."""
    return TrainConfig(
        name="tiny",
        model=Transformer(width=16, hidden=32, num_heads=2, num_layers=2),
        mesh={"pp": 2, "dp": 1},
        schedule=dualpipe,
        num_microbatches=4,
        microbatch_size=2,
        sequence_length=16,
        num_steps=8,
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=2),
        eval_every=4,
        checkpoint_every=3,
    )
