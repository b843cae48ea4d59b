"""Architectures for these tests: as small as shows what is tested."""

import dataclasses

from dualpipe_jax.deepseek import DeepSeekConfig

# No two widths are alike, so that one taken for another shows.
SMALL = DeepSeekConfig(
    vocab_size=11,
    hidden_size=12,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=14,
    num_attention_heads=2,
    q_lora_rank=10,
    kv_lora_rank=9,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=3,
    n_routed_experts=4,
    moe_intermediate_size=6,
    num_experts_per_tok=2,
    initializer_range=0.5,
)


def small(**changes) -> DeepSeekConfig:
    return dataclasses.replace(SMALL, **changes)
