"""A byte-level DeepSeek-V3-style model for one GPU."""

from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig
from dualpipe_jax.train import OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    """A DeepSeek-V3-style model of 157M parameters, 36M active, on one GPU.

    With one rank, 1F1B only accumulates gradients over the microbatches. Experts are
    not divided over devices, so there is nothing to balance.

    Command: `python -m dualpipe_jax train configs/small.py --data PATH...`.
    Runtime, result: not measured yet, for lack of a GPU.
    """
    return TrainConfig(
        name="small",
        model=DeepSeek(
            architecture=DeepSeekConfig(
                vocab_size=256,
                hidden_size=512,
                num_hidden_layers=12,
                first_k_dense_replace=1,
                intermediate_size=1536,
                num_attention_heads=8,
                q_lora_rank=384,
                kv_lora_rank=128,
                qk_nope_head_dim=64,
                qk_rope_head_dim=32,
                v_head_dim=64,
                n_routed_experts=32,
                moe_intermediate_size=256,
                num_experts_per_tok=4,
                n_shared_experts=1,
                initializer_range=0.02,
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
