"""The main job: a byte-level language model, trained with DualPipe."""

from dualpipe_jax.generators.dualpipe import dualpipe
from dualpipe_jax.train.config import OptimizerConfig, TrainConfig
from dualpipe_jax.train.model import Transformer


def config() -> TrainConfig:
    """A 1.8M-parameter transformer on 8 virtual CPU devices, pp=4 x dp=2.

    Command: `make train`, or `python -m dualpipe_jax train configs/bytes.py`.
    Runtime: 235 CPU seconds, compiling included (Python 3.11, jax 0.10.2).
    Result: held-out loss 2.17 nats a byte after 80 steps, from 5.69.
    """
    return TrainConfig(
        name="bytes",
        model=Transformer(width=128, hidden=384, num_heads=4, num_layers=8),
        mesh={"pp": 4, "dp": 2},
        schedule=dualpipe,
        num_microbatches=8,
        microbatch_size=4,
        sequence_length=128,
        num_steps=80,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        eval_every=20,
        checkpoint_every=40,
        platform="cpu",
    )
