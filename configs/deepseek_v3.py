"""DeepSeek-V3: 671B parameters, 37B of them active."""

import dataclasses

from dualpipe_jax import Schedule, dualpipe
from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig, EplbConfig
from dualpipe_jax.train import OptimizerConfig, TrainConfig


def architecture() -> DeepSeekConfig:
    """The published sizes (arXiv:2412.19437, section 4.2), with depth-1 MTP."""
    return DeepSeekConfig(
        vocab_size=129_280,
        hidden_size=7168,
        num_hidden_layers=61,
        first_k_dense_replace=3,
        intermediate_size=18_432,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        moe_intermediate_size=2048,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    )


def whole_dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns DualPipe with whole backwards.

    The wgrad residuals of a split backward would take most of a GPU's memory.
    """
    return dualpipe(num_ranks, num_microbatches).with_whole_backwards()


def sparing_dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Returns DualPipe with one microbatch of a rank between I and W at a time.

    What waits for W takes 4.6 GiB for each, with products in float8 (8.7 in bfloat16).
    """
    schedule = dualpipe(num_ranks, num_microbatches)
    return schedule.with_whole_backwards(max_waiting=1)


def _model() -> DeepSeek:
    return DeepSeek(
        architecture=architecture(),
        compute_dtype="bfloat16",
        remat=("attention", "experts"),
        payload="fp8",
        eplb=EplbConfig(every=1000, num_redundant=64, num_nodes=8),
        buffer_factor=1.25,
        stage_code="own",
        # A fifth layer in one stage would take a quarter more memory on all ranks.
        max_layers=4,
    )


def config() -> TrainConfig:
    """The published training setting: PP 16 x EP 64 on 1,024 GPUs (2,048 with dp=2).

    The report's batch grows to 15,360 sequences of 4,096 tokens; this one has 3,840, in
    60 microbatches with one sequence per device.

    Command: `srun python -m dualpipe_jax train configs/deepseek_v3.py --distributed
    --data TOKENS.npy`, with tokens of a vocabulary of 129,280.
    Runtime, result: not measured, for lack of 1,024 GPUs. A test counts the parameters:
    671B, 37B of them active. Compiled for H800s it needs 72.9 of 79.1 GiB per GPU
    (`python -m dualpipe_jax memory deepseek_v3 --gpu h800`), and a pair of full stages
    hides 99.8 % of its exchanges: benchmarks/results/overlap_gpu_2026-11-22.md.
    """
    return TrainConfig(
        name="deepseek_v3",
        model=_model(),
        mesh={"pp": 16, "dp": 1, "ep": 64},
        schedule=whole_dualpipe,
        num_microbatches=60,
        microbatch_size=64,
        sequence_length=4096,
        num_steps=500_000,
        optimizer=OptimizerConfig(
            learning_rate=2.2e-4,
            warmup_steps=2000,
            final_fraction=1 / 30,
            # As in the report, section 3.3.2, where the second moment is bfloat16 too.
            mean_dtype="bfloat16",
        ),
        eval_every=1000,
        checkpoint_every=500,
        shard_at_rest=True,
    )


def two_pods() -> TrainConfig:
    """The same with dp=2 on 2,048 GPUs, the size of the report's cluster."""
    one = config()
    return dataclasses.replace(
        one,
        name="deepseek_v3_dp2",
        mesh={"pp": 16, "dp": 2, "ep": 64},
        microbatch_size=128,
    )


def fp8() -> TrainConfig:
    """The same with products in float8, as the model was trained, and some W apart.

    One I of a rank at a time is apart from its W, to fill bubbles. Not compiled yet: by
    the program's account it needs 4.6 GiB more per GPU than whole backwards. Simulated
    with DeepSeek's costs, bubbles are 13.8 % instead of 15.4 %.
    """
    one = config()
    return dataclasses.replace(
        one,
        name="deepseek_v3_fp8",
        model=dataclasses.replace(_model(), products="fp8"),
        schedule=sparing_dualpipe,
    )
