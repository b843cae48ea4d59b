"""Small budgets, one after the other, end where a single large one does."""

import numpy as np
import pytest

from eplb_jax.placement.quality import balancedness
from eplb_jax.placement.refine import refine_placement
from tests.eplb.placement.cases import DEVICES, EXPERTS, LAYERS, REPLICAS, lognormal

# Two experts on each of eight devices, and none to spare.
FEW, FEW_DEVICES = 16, 8


def few_loads():
    """Loads [layers, 16]: devices that share the peak, and random ones."""
    tied = np.array([10.0] * 8 + [1.0] * 8)
    nearly = tied * np.linspace(1, 1.01, 16)
    rng = np.random.default_rng(0)
    others = [rng.lognormal(0, sigma, 16) for sigma in (0.5, 1, 1.5) for _ in range(12)]
    drawn = rng.integers(0, 4, (4, 16)) * 1.0  # many ties
    return np.stack([tied, nearly, np.sort(others[0]), *others, *drawn])


def in_order(num_layers, num_physical, num_experts):
    return np.tile(np.arange(num_physical) % num_experts, (num_layers, 1))


def repeat(weight, placement, num_devices, max_moves, **options):
    """Refines until nothing moves; no call makes the peak higher or moves too much."""
    scores = [np.asarray(balancedness(weight, placement, num_devices))]
    for _ in range(200):
        new, moves = refine_placement(
            weight, placement, num_devices, max_moves=max_moves, **options
        )
        assert int(np.max(moves)) <= max_moves
        scores.append(np.asarray(balancedness(weight, new, num_devices)))
        # Sums in another order: float32 rounding.
        assert (scores[-1] >= scores[-2] * (1 - 1e-6)).all()
        placement = new
        if not np.asarray(moves).any():
            return np.asarray(placement), scores[-1]
    raise AssertionError("it never stops")


@pytest.mark.parametrize("max_moves", [2, 3, 6])
def test_where_no_expert_has_a_second_replica(max_moves):
    weight = few_loads()
    old = in_order(len(weight), FEW, FEW)
    large, _ = refine_placement(weight, old, FEW_DEVICES, max_moves=FEW)
    reached = np.asarray(balancedness(weight, large, FEW_DEVICES))
    assert reached[0] == 1 and reached[1] > 0.99
    small, scores = repeat(weight, old, FEW_DEVICES, max_moves)
    assert (scores >= 0.98 * reached).all()
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize("max_moves", [2, 5])
def test_where_some_have(max_moves):
    old = in_order(LAYERS, REPLICAS, EXPERTS)
    for seed in range(4):
        weight = lognormal(seed, sigma=0.5 + seed / 3)
        large, _ = refine_placement(weight, old, DEVICES, max_moves=REPLICAS)
        reached = np.asarray(balancedness(weight, large, DEVICES))
        small, scores = repeat(weight, old, DEVICES, max_moves)
        assert (scores >= 0.98 * reached).all()
        np.testing.assert_array_equal(small, large)


def test_every_call_of_a_tie_comes_nearer():
    # The peak is as high until the last of four devices is cooled.
    weight = few_loads()[:1]
    placement, cooled = in_order(1, FEW, FEW), []
    for _ in range(4):
        placement, moves = refine_placement(weight, placement, FEW_DEVICES, max_moves=2)
        load_D = weight[0][np.asarray(placement)[0]].reshape(FEW_DEVICES, 2).sum(axis=1)
        cooled.append(int((load_D == 11).sum()))
        assert moves.tolist() == [2]
    assert cooled == [2, 4, 6, 8]
