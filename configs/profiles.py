"""The settings of DeepSeek's published profiles (deepseek-ai/profile-data, README).

The model's sizes are DeepSeek-V3's. What the profiles do not say (redundant experts,
ranks of the pipeline) is our choice, and marked as such.
"""

import dataclasses

from dualpipe_jax.configs.deepseek_v3 import architecture
from dualpipe_jax.deepseek import DeepSeek, ServeConfig
from dualpipe_jax.train import OptimizerConfig, TrainConfig


def training() -> TrainConfig:
    """One forward and one backward chunk of four MoE layers: EP64, 4K sequence.

    Four ranks (our choice) are the fewest whose steady state has two ranks that are
    neither the first nor the last. A microbatch is one sequence per device. As in the
    report, tokens travel to their experts in float8, and attention is recomputed.

    Command: `python -m dualpipe_jax overlap profiles:training --gpu h800`, with tokamax
    installed; it compiles for GPUs and needs none.
    Runtime, result: DeepSeek's trace spans 129 ms and hides 96.3 % of the
    communication. Ours has not run; benchmarks/results/ has XLA's schedule of it.
    """
    num_ranks, layers_per_chunk, num_devices = 4, 4, 64
    sizes = dataclasses.replace(
        architecture(),
        num_hidden_layers=num_ranks * layers_per_chunk,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
    )
    return TrainConfig(
        name="profile_training",
        model=DeepSeek(
            architecture=sizes,
            compute_dtype="bfloat16",
            buffer_factor=1.25,
            remat=("attention",),
            payload="fp8",
            # Four layers per stage, whatever the head after the last one costs.
            layer_costs=(1.0,) * sizes.num_hidden_layers,
            head_cost=0.0,
        ),
        mesh={"pp": num_ranks, "ep": num_devices},
        schedule="dualpipe",
        num_microbatches=8 * num_ranks,
        microbatch_size=num_devices,
        sequence_length=4096,
        num_steps=10,
        optimizer=OptimizerConfig(learning_rate=2.2e-4, warmup_steps=1),
        shard_at_rest=True,
    )


def exact_training() -> TrainConfig:
    """The training profile with exact balance: two extra slots of a device.

    With these, the fullest of 64 devices that hold the experts in order has at most
    1.02 times the mean, in all layers of recorded loads. Fetched weights and their
    gradients take memory, so the experts are recomputed, too.

    Command: `python -m dualpipe_jax overlap profiles:exact_training --gpu h800`, as
    above.
    Runtime, result: has not run. XLA's schedule hides 79 % of its communication; what
    is exposed are fetches (benchmarks/results/exact_balance_2026-11-27.md).
    """
    config = training()
    assert isinstance(config.model, DeepSeek)
    model = dataclasses.replace(
        config.model,
        balance="exact",
        num_fetched=2,
        buffer_factor=1.02,
        remat=("attention", "experts"),
    )
    return dataclasses.replace(config, name="profile_exact_training", model=model)


def fp8_training() -> TrainConfig:
    """The training profile with products in float8, as DeepSeek's was recorded.

    Command: `python -m dualpipe_jax overlap profiles:fp8_training --gpu h800`, as
    above.
    Runtime, result: has not run. XLA's schedule is slower than in bfloat16, since it
    quantizes in several passes (benchmarks/results/fp8_2026-11-27.md).
    """
    config = training()
    assert isinstance(config.model, DeepSeek)
    model = dataclasses.replace(config.model, products="fp8")
    return dataclasses.replace(config, name="profile_fp8_training", model=model)


def prefill() -> ServeConfig:
    """EP32, prompts of 4K tokens, 16K tokens per GPU in two microbatches.

    The 32 redundant experts are the report's (arXiv:2412.19437, section 3.4.1), as are
    eight GPUs per node and tokens that travel once to each node. It has sixteen of the
    MoE layers, which are all alike, so that it compiles in minutes.

    Command: `python -m dualpipe_jax overlap profiles:prefill --gpu h100`, with tokamax
    installed; it compiles for GPUs and needs none.
    Runtime, result: has not run; benchmarks/results/ has XLA's schedule of it.
    """
    return ServeConfig(
        name="profile_prefill",
        architecture=dataclasses.replace(
            architecture(), num_hidden_layers=16, first_k_dense_replace=0
        ),
        phase="prefill",
        num_devices=32,
        num_nodes=4,
        num_redundant=32,
        compute_dtype="bfloat16",
        requests_per_device=4,
        context_length=4096,
        prompts_per_device=4,
        route="by_node",
        payload="fp8",
        buffer_factor=1.25,
    )


def decode() -> ServeConfig:
    """EP128, 128 requests per GPU with a context of 4K tokens, in two microbatches.

    One redundant expert per GPU is our choice: each GPU has three physical experts. It
    has the first 32 layers: in bfloat16, all 61 and their caches do not fit into 80 GB.

    Command: `python -m dualpipe_jax overlap profiles:decode --gpu h800`, as above.
    Runtime, result: has not run; benchmarks/results/ has XLA's schedule of it.
    """
    return ServeConfig(
        name="profile_decode",
        architecture=dataclasses.replace(architecture(), num_hidden_layers=32),
        phase="decode",
        num_devices=128,
        num_nodes=16,
        num_redundant=128,
        compute_dtype="bfloat16",
        requests_per_device=128,
        context_length=4096,
        payload="fp8",
        buffer_factor=2.0,
    )


def fp8_decode() -> ServeConfig:
    """The decode profile with matrices in float8, so that all 61 layers fit.

    By the program's account weights and caches take 59.4 of 79.1 GiB.

    Command: `python -m dualpipe_jax overlap profiles:fp8_decode --gpu h800`, as above.
    Runtime, result: has not run, and all 61 layers were not compiled; of 24, XLA's
    schedule hides 92.4 % (benchmarks/results/fp8_2026-11-27.md).
    """
    return dataclasses.replace(
        decode(),
        name="profile_fp8_decode",
        architecture=architecture(),
        products="fp8",
    )
