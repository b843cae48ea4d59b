"""A model of the 16B-A3B class: DeepSeek-V2-Lite's sizes with DeepSeek-V3's router."""

from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig, EplbConfig
from dualpipe_jax.train import OptimizerConfig, TrainConfig


def architecture() -> DeepSeekConfig:
    """15.7B parameters, 2.7B active (DeepSeek-V2 paper, arXiv:2405.04434, appendix B).

    V2-Lite has a softmax router and no groups; this model has V3's sigmoid router and
    bias.
    """
    return DeepSeekConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        intermediate_size=10_944,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        n_shared_experts=2,
    )


def config() -> TrainConfig:
    """On 64 GPUs: pp=4 x ep=8 x dp=2, with eight redundant experts per layer.

    Command: `srun python -m dualpipe_jax train configs/moe_16b.py --distributed
    --data TOKENS.npy`, with tokens of a vocabulary of 102,400.
    Runtime, result: not measured, for lack of 64 GPUs.
    """
    return TrainConfig(
        name="moe_16b",
        model=DeepSeek(
            architecture=architecture(),
            compute_dtype="bfloat16",
            eplb=EplbConfig(every=100, num_redundant=8),
            buffer_factor=1.5,
        ),
        mesh={"pp": 4, "dp": 2, "ep": 8},
        schedule="dualpipe",
        num_microbatches=32,
        microbatch_size=16,
        sequence_length=4096,
        num_steps=100_000,
        optimizer=OptimizerConfig(learning_rate=4.2e-4, warmup_steps=2000),
        eval_every=1000,
        checkpoint_every=1000,
        shard_at_rest=True,
    )
