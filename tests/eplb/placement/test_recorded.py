"""Loads of a DeepSeek-V3 deployment: the promised figures.

tests/docs/ has the output that docs/eplb.md shows for them.
Checks that need the same programs share a test, since compiling them takes longest.
"""

from pathlib import Path

import numpy as np
import pytest

from eplb_jax.placement.placement import rebalance_experts
from eplb_jax.placement.quality import balancedness, count_duplicates, remote_share
from eplb_jax.placement.refine import refine_placement
from eplb_jax.placement.soft import home_nodes

ROOT = Path(__file__).parents[3]
LOADS = np.load(ROOT / "tests" / "data" / "eplb_loads_deepseek_v3.npz")
WINDOWS = ("prefill_in2048", "prefill_in2000out100")
DENSE = 3  # the first layers have no experts


def scores(weight, placement, num_devices=32):
    return np.asarray(balancedness(weight, placement, num_devices))[DENSE:]


@pytest.mark.slow
def test_soft():
    for window in WINDOWS:
        weight = LOADS[window].astype(np.float32)
        maps = rebalance_experts(weight, 288, 8, 4, 32, policy="soft")
        score = scores(weight, maps[0])
        assert score.mean() >= 0.97
        assert score.min() >= 0.80
        home = home_nodes(weight, 8, 4)
        share = np.asarray(remote_share(weight, maps[0], home, 4))[DENSE:]
        assert share.mean() <= 0.15
        assert not np.asarray(count_duplicates(maps[0], 32)).any()


@pytest.mark.slow
def test_swaps_and_refining():
    for window in WINDOWS:
        weight = LOADS[window][DENSE:]
        placement = rebalance_experts(weight, 288, 1, 1, 32, policy="swaps")[0]
        assert np.asarray(balancedness(weight, placement, 32)).mean() >= 0.999
        assert not np.asarray(count_duplicates(placement, 32)).any()
    before, after = LOADS["prefill_in1024"][DENSE:], LOADS["prefill_in2048"][DENSE:]
    old = rebalance_experts(before, 288, 1, 1, 32)[0]
    new, moves = refine_placement(after, old, 32, max_moves=48)
    changed = (np.asarray(new) != np.asarray(old)).sum(axis=1)
    assert moves.tolist() == changed.tolist()
    assert changed.max() <= 48
    assert changed.mean() <= 0.167 * 288
    assert np.asarray(balancedness(after, new, 32)).mean() >= 0.9965
    assert not np.asarray(count_duplicates(new, 32)).any()
