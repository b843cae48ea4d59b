"""Architectures for these tests: as small as shows what is tested."""

import dataclasses

from dualpipe_jax.deepseek import DeepSeekConfig

# No two widths are alike, so that one taken for another shows.
SMALL = DeepSeekConfig(
    vocab_size=11,
    dim=12,
    num_layers=3,
    num_dense_layers=1,
    dense_hidden=14,
    num_heads=2,
    q_rank=10,
    kv_rank=9,
    nope_dim=5,
    rope_dim=4,
    value_dim=3,
    num_experts=4,
    expert_hidden=6,
    experts_per_token=2,
    init_std=0.5,
)


def small(**changes) -> DeepSeekConfig:
    return dataclasses.replace(SMALL, **changes)
