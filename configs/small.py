"""A byte-level model of the same kind for one GPU."""

from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig
from dualpipe_jax.train import OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    """A DeepSeek-V3-style model of 157M parameters, 36M active, on one GPU.

    One rank is a pipeline without neighbours: 1F1B accumulates gradients over the
    microbatches. Experts are not divided, so there is nothing to balance.

    Command: `python -m dualpipe_jax train configs/small.py --data PATH...`.
    Runtime: not measured yet: written without a GPU at hand.
    Result: not measured yet.
    """
    return TrainConfig(
        name="small",
        model=DeepSeek(
            architecture=DeepSeekConfig(
                vocab_size=256,
                dim=512,
                num_layers=12,
                num_dense_layers=1,
                dense_hidden=1536,
                num_heads=8,
                q_rank=384,
                kv_rank=128,
                nope_dim=64,
                rope_dim=32,
                value_dim=64,
                num_experts=32,
                expert_hidden=256,
                experts_per_token=4,
                num_shared_experts=1,
                init_std=0.02,
            ),
            compute_dtype="bfloat16",
        ),
        mesh={"pp": 1},
        schedule="1f1b",
        num_microbatches=4,
        microbatch_size=16,
        sequence_length=1024,
        num_steps=2000,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        eval_every=200,
        checkpoint_every=500,
        sample_tokens=500,
    )
