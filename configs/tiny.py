"""The main job: a byte-level DeepSeek-V3-style model, trained with DualPipe."""

from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig, EplbConfig
from dualpipe_jax.train import OptimizerConfig, TrainConfig


def architecture() -> DeepSeekConfig:
    """Six layers, one of them dense, of 128 features: 2.7M parameters."""
    return DeepSeekConfig(
        vocab_size=256,
        dim=128,
        num_layers=6,
        num_dense_layers=1,
        dense_hidden=384,
        num_heads=4,
        q_rank=64,
        kv_rank=32,
        nope_dim=32,
        rope_dim=16,
        value_dim=32,
        num_experts=8,
        expert_hidden=128,
        experts_per_token=2,
        num_shared_experts=1,
        init_std=0.06,
    )


def config() -> TrainConfig:
    """A DeepSeek-V3-style model on 8 virtual CPU devices, pp=4 x ep=2.

    Command: `make train`, or `python -m dualpipe_jax train configs/tiny.py`.
    Runtime: 405 CPU seconds, compiling included (Python 3.11, jax 0.10.2).
    Result: held-out loss 2.29 nats a byte after 80 steps, from 5.71; balancedness 0.95,
      where it were 0.89 without EPLB.
    """
    return TrainConfig(
        name="tiny",
        model=DeepSeek(
            architecture=architecture(),
            eplb=EplbConfig(every=10, num_redundant=2),
        ),
        mesh={"pp": 4, "ep": 2},
        schedule="dualpipe",
        num_microbatches=8,
        microbatch_size=4,
        sequence_length=128,
        num_steps=80,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        eval_every=20,
        checkpoint_every=40,
        sample_tokens=200,
        platform="cpu",
    )
