"""The main job: a byte-level DeepSeek-V3-style model, trained with DualPipe."""

import dataclasses
from typing import Any

from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig, EplbConfig
from dualpipe_jax.train import OptimizerConfig, TrainConfig


def architecture() -> DeepSeekConfig:
    """Six layers of width 128, one of them dense: 2.7M parameters."""
    return DeepSeekConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        intermediate_size=384,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        moe_intermediate_size=128,
        num_experts_per_tok=2,
        n_shared_experts=1,
        initializer_range=0.06,
    )


def model(**options: Any) -> DeepSeek:
    """The model, with redundant experts."""
    eplb = EplbConfig(every=10, num_redundant=2)
    return DeepSeek(architecture=architecture(), eplb=eplb, **options)


def config() -> TrainConfig:
    """A DeepSeek-V3-style model on 8 virtual CPU devices, pp=4 x ep=2.

    Command: `make train`, or `python -m dualpipe_jax train configs/tiny.py`.
    Runtime: 405 CPU seconds, compiling included (Python 3.11, jax 0.10.2).
    Result: held-out loss 2.29 nats per byte after 80 steps, from 5.71; balancedness
      0.95, against 0.89 without EPLB.
    """
    return TrainConfig(
        name="tiny",
        model=model(),
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


def fp8() -> TrainConfig:
    """The same with products and tokens in float8, as the DeepSeek-V3 report trains.

    Command: `python -m dualpipe_jax train tiny:fp8`.
    """
    in_float8 = model(products="fp8", payload="fp8")
    return dataclasses.replace(config(), name="tiny_fp8", model=in_float8)
