"""Prefill and decode compiled for GPUs without one: what hides the expert exchanges.

Small enough to compile in half a minute, with as much compute to communication as
DeepSeek-V3 has; benchmarks/results/ has its own figures.
"""

import dataclasses

import jax
import pytest

from dualpipe_jax.configs import profiles
from dualpipe_jax.deepseek.serve import ServeConfig, make_serve_programs
from dualpipe_jax.gpu.overlap import compile_overlapped, overlap_report
from dualpipe_jax.gpu.topology import gpu_mesh
from tests.kept import KeptLowered

# Each compiles a step for GPUs twice, if none is kept.
pytestmark = [pytest.mark.slow, pytest.mark.as_users]

SIZES = dataclasses.replace(
    profiles.decode().architecture,
    vocab_size=2048,
    hidden_size=2048,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    num_attention_heads=32,
    q_lora_rank=512,
    kv_lora_rank=256,
    n_routed_experts=16,
    moe_intermediate_size=2048,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)


def report_of(**changes):
    config = ServeConfig(
        name="gpu",
        architecture=SIZES,
        compute_dtype="bfloat16",
        num_devices=8,
        num_nodes=2,
        context_length=2048,
        payload="fp8",
        buffer_factor=1.5,
        **changes,
    )
    mesh = gpu_mesh("h100", {"ep": 8}, gpus_per_host=4)
    with jax.numpy_dtype_promotion("standard"):  # flax's norms mix bfloat16 and float32
        lowered = make_serve_programs(config, mesh).lower()
    lowered = KeptLowered(lowered, mesh)
    compiled = compile_overlapped(lowered, gpus_per_node=4)
    return compiled, overlap_report(compiled, gpu="h100", gpus_per_node=4)


def test_decode():
    compiled, report = report_of(phase="decode", requests_per_device=256)
    entry = report.steady_state
    exchanges = [each for each in entry.collectives if "all-to-all" in each.kind]
    # There and back, in both layers, of both halves; no small ones besides.
    assert [each.phase for each in exchanges] == (
        ["dispatch(F)"] * 2 + ["combine(F)"] * 2
    ) * 2
    assert all(each.under.gemms for each in exchanges)
    assert entry.hidden_fraction >= 0.9
    # Caches change in place.
    memory = compiled.memory_analysis()
    caches = 2 * 2 * 128 * 2048 * (256 + SIZES.qk_rope_head_dim) * 2
    assert memory.alias_size_in_bytes >= caches
    assert memory.temp_size_in_bytes < caches


def test_prefill():
    _, report = report_of(phase="prefill", requests_per_device=4, prompts_per_device=4)
    entry = report.steady_state
    exchanges = [each for each in entry.collectives if "all-to-all" in each.kind]
    assert len(exchanges) == 2 * 2 * 2
    # Behind the last layer's last exchange there is nothing of the other half.
    *others, last = exchanges
    assert last.phase == "combine(F)"
    assert all(each.under.gemms for each in others)
    assert sum(each.exposed_s for each in others) <= 0.1 * entry.communication_s
