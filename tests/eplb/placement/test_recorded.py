"""Loads of a DeepSeek-V3 deployment: the promised figures, and docs/eplb.md's output.

Checks that need the same programs share a test, since compiling them takes longest.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from eplb_jax.commands.main import main
from eplb_jax.placement.placement import rebalance_experts
from eplb_jax.placement.quality import balancedness, count_duplicates, remote_share
from eplb_jax.placement.refine import refine_placement
from eplb_jax.placement.soft import home_nodes

ROOT = Path(__file__).parents[3]
LOADS = np.load(ROOT / "tests" / "data" / "eplb_loads_deepseek_v3.npz")
WINDOWS = ("prefill_in2048", "prefill_in2000out100")
DENSE = 3  # the first layers have no experts


def check_command(name, capsys):
    """Runs a command of docs/eplb.md, where `...` is the rest of the output."""
    text = (ROOT / "docs" / "eplb.md").read_text()
    block = re.search(
        rf"^\$ python -m eplb_jax ({name} .*)\n((?:.*\n)*?)```", text, re.M
    )
    assert block
    assert main(block[1].split()) == 0
    printed = capsys.readouterr().out
    shown, is_cut, _ = block[2].partition("...\n")
    assert printed.startswith(shown)
    assert is_cut or printed == shown


def scores(weight, placement, num_devices=32):
    return np.asarray(balancedness(weight, placement, num_devices))[DENSE:]


@pytest.mark.slow
def test_soft(capsys, monkeypatch):
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
    monkeypatch.chdir(ROOT)
    check_command("rebalance", capsys)


@pytest.mark.slow
def test_swaps_and_refining(capsys, monkeypatch):
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
    monkeypatch.chdir(ROOT)
    check_command("replay", capsys)
