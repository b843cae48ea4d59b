"""A server's settings: what they default to, and which ones are refused."""

import dataclasses

import pytest

from dualpipe_jax.configs import deepseek_v3, tiny_server
from dualpipe_jax.deepseek.serve import RebalanceConfig, ServeConfig, prometheus

SIZES = deepseek_v3.architecture()


def make(**changes):
    """A server on 32 devices, with the required fields and some others."""
    fields = {
        "name": "server",
        "architecture": SIZES,
        "num_devices": 32,
        "requests_per_device": 4,
        "context_length": 96,
    }
    return ServeConfig(**fields | changes)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, (96, 2 * 96)),
        ({"prompts_per_device": 4}, (96, 4 * 96)),
        ({"max_prompt_length": 32}, (32, 2 * 32)),
        ({"max_prefill_tokens": 98}, (96, 98)),
        ({"max_prompt_length": 32, "max_prefill_tokens": 40}, (32, 40)),
        ({"max_prefill_tokens": 80}, (96, 80)),
    ],
)
def test_lengths_that_are_not_given_follow_from_others(given, expected):
    config = make(**given)
    assert (config.max_prompt_length, config.max_prefill_tokens) == expected
    assert config.has_pieces == (expected[0] > expected[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"phase": "train"}, "phase='train' must be 'prefill' or 'decode'"),
        ({"route": "by-node"}, "route='by-node' must be 'direct' or 'by_node'"),
        (
            {"context_length": 2**31 - 1, "max_prompt_length": 96},
            r"context_length=2147483647 with 128 heads, make an array of 5.3e\+13 num",
        ),
        (
            {"context_length": 2**18, "max_prompt_length": 96}
            | {"requests_per_device": 2**17 + 2, "max_prefill_tokens": 96}
            | {"architecture": dataclasses.replace(SIZES, num_attention_heads=1)},
            r"requests_per_device=131074 and .*context_length=262144 make a cache of",
        ),
        ({"payload": "fp4"}, "payload='fp4' must be 'plain' or 'fp8'"),
        ({"compute_dtype": "float64"}, "must be 'float32' or 'bfloat16'"),
        (
            {"products": "fp8", "balance": "exact"},
            "balance='exact' fetches weights that are not float8 only",
        ),
        ({"num_fetched": 2}, "num_fetched=2 needs balance='exact'"),
        ({"spread_shared": True}, "spread_shared=True needs balance='exact'"),
        ({"exact_from": 8}, "exact_from=8 needs balance='exact'"),
        ({"num_devices": 0}, "num_devices=0 must be at least 1"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be at least 1"),
        ({"num_nodes": 3}, "num_nodes=3 must divide .*32"),
        ({"num_redundant": 3}, "= 259 must be a multiple of .*32"),
        ({"requests_per_device": 3}, "requests_per_device=3 must be even"),
        ({"prompts_per_device": 3}, "prompts_per_device=3 must be even"),
        ({"max_prefill_tokens": 97}, "max_prefill_tokens=97 must be even"),
        ({"buffer_factor": 0}, "buffer_factor=0 must be above 0"),
        ({"buffer_factor": float("nan")}, "buffer_factor=nan must be a finite number"),
        (
            {"max_prompt_length": 97},
            "max_prompt_length=97 must be at most .*context_length=96",
        ),
        (
            {"architecture": dataclasses.replace(SIZES, first_k_dense_replace=61)},
            "no MoE layer",
        ),
        (
            {
                "architecture": dataclasses.replace(SIZES, hidden_size=96),
                "payload": "fp8",
            },
            "do not divide 96 features",
        ),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"every": 0}, "every=0 must be at least 1"),
        ({"every": 2.5}, r"every=2\.5 must be an integer"),
        ({"decay": 1.0}, r"decay=1\.0 must be below 1"),
    ],
)
def test_rebalancing_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        RebalanceConfig(**change)


def test_the_tiny_server_fits():
    config = tiny_server.config()
    assert (config.max_prompt_length, config.max_prefill_tokens) == (128, 128)


def test_prometheus_text_is_well_formed():
    text = prometheus({"balancedness": 0.5, "num_moves": 3.0}, prefix="moe")
    assert text.splitlines()[2] == "moe_balancedness 0.5"
    assert text.splitlines()[5] == "moe_moves_total 3.0"
