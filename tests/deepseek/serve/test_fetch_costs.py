"""From how many tokens on experts are fetched."""

import pytest

from dualpipe_jax.configs import profiles
from dualpipe_jax.configs.deepseek_v3 import architecture
from dualpipe_jax.deepseek import break_even
from dualpipe_jax.gpu import GPUS

V3 = architecture()


def test_it_is_where_both_take_equally_long():
    found = break_even(V3, "h800", 32, imbalance=1.5)
    gpu, expert = GPUS["h800"], 3 * 7168 * 2048
    flops = gpu.bf16_flops * 0.7
    link = 24 / 32 / gpu.network_bandwidth  # slower than 7 / 32 by NVLink
    row = 2 * expert / flops + (7168 + 4 * 56 + 2 * 7168) * link
    # Either way they multiply for longer than they read their experts.
    assert 8 * found / flops > 9 / gpu.memory_bandwidth / 0.7
    cost = 2 * expert * link + 100 * 1.5e-6 + 3 * 20e-6
    assert found == pytest.approx(cost / (0.5 * 8 * row), abs=1)


def test_it_follows_what_a_fetch_costs_and_gains():
    default = break_even(V3, "h800", 32)
    assert break_even(V3, "h800", 32, imbalance=2.0) < default
    assert break_even(V3, "h800", 32, num_fetched=2) > default
    assert break_even(V3, "h800", 8) < default  # NVLink only
    assert break_even(V3, "h800", 32, imbalance=1.0) is None
    assert break_even(V3, "h800", 1) is None


def test_the_profiles():
    """Prefill gains, decode does not."""
    for config, expected in ((profiles.prefill(), True), (profiles.decode(), False)):
        least = break_even(config.architecture, "h800", config.num_devices)
        assert (config.tokens_per_device // 2 >= least) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h900"}, "gpu='h900' is unknown"),
        ({"ep": 0}, "ep=0 must be above 0"),
        ({"imbalance": 0.9}, "imbalance=0.9 must be at least 1"),
        ({"efficiency": -1.0}, "efficiency=-1.0 must be above 0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        break_even(V3, **{"gpu": "h800", "ep": 32} | options)
