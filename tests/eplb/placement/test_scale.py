"""Loads of any scale: plans and scores depend on their ratios only."""

import jax
import numpy as np
import pytest

from eplb_jax.placement.placement import rebalance_experts
from eplb_jax.placement.quality import balancedness, balancedness_bound, remote_share
from eplb_jax.placement.refine import refine_placement
from eplb_jax.placement.scale import scale_loads
from eplb_jax.placement.soft import home_nodes
from tests.eplb.placement.cases import DEVICES, EXPERTS, LAYERS, REPLICAS, SIZES

# Whole numbers below 16 are exact as denormal numbers, and finite at the other end,
# where two of the largest are infinite together.
COUNTS = np.random.default_rng(0).integers(1, 16, (LAYERS, EXPERTS))
COUNTS = COUNTS.astype(np.float32)
POWERS = (-149, -130, 124)


def scaled(power):
    return np.ldexp(COUNTS, power)


def test_the_scale_is_a_power_of_two_for_each_layer():
    rng = np.random.default_rng(1)
    weight = rng.lognormal(0, 9, (4, 30)).astype(np.float32)
    weight[1] = np.ldexp(weight[1], -120)
    weight[2] = 0
    weight[3, :3] = 0, 3e38, 2.0**-149
    got = scale_loads(weight)
    first = got.max(axis=1)
    assert ((first >= 2.0**100) & (first < 2.0**101))[[0, 1, 3]].all()
    assert not got[2].any()
    for layer in (0, 1, 3):
        factor = np.float64(first[layer]) / np.float64(weight[layer].max())
        assert np.log2(factor) == round(np.log2(factor))
        expected = weight[layer] * factor
        expected[expected < 2.0**-126] = 0
        np.testing.assert_array_equal(got[layer], expected)
    np.testing.assert_array_equal(jax.jit(scale_loads)(weight), got)


def test_what_is_no_load_counts_as_zero():
    weight = np.array([[np.nan, -1, np.inf, -np.inf, -0.0, 2, 1]], np.float32)
    expected = np.ldexp(np.float32([[0, 0, 0, 0, 0, 2, 1]]), 99)
    for scale in (scale_loads, jax.jit(scale_loads)):
        np.testing.assert_array_equal(scale(weight), expected)


@pytest.mark.parametrize(
    "policy",
    ["hierarchical", "global", "soft", pytest.param("swaps", marks=pytest.mark.slow)],
)
def test_a_power_of_two_does_not_change_a_plan(policy):
    expected = rebalance_experts(COUNTS, *SIZES, policy=policy)
    expected.validate()
    for power in POWERS:
        maps = rebalance_experts(scaled(power), *SIZES, policy=policy)
        for one, other in zip(maps, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_nor_what_is_refined_and_what_is_measured():
    old = np.tile(np.arange(REPLICAS) % EXPERTS, (LAYERS, 1))
    home = home_nodes(COUNTS, 8, 4)

    def measure(weight):
        new, _ = refine_placement(weight, old, DEVICES, max_moves=8)
        return (
            new,
            home_nodes(weight, 8, 4),
            balancedness(weight, new, DEVICES),
            balancedness_bound(weight, REPLICAS, DEVICES),
            remote_share(weight, new, home, 4),
        )

    expected = measure(COUNTS)
    for power in POWERS:
        for one, other in zip(measure(scaled(power)), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    inside = jax.jit(balancedness, static_argnums=2)
    np.testing.assert_array_equal(
        inside(scaled(-149), old, DEVICES), inside(COUNTS, old, DEVICES)
    )


def test_an_expert_of_a_float_load_is_never_lost():
    weight = [[3e38, 1e38, 2e38, 3e38, 1e38, 1e38, 2e38, 1e38]]
    rebalance_experts(weight, 10, 1, 1, 2, policy="global").validate()
