"""Refinement: it keeps its budget, its moves pay, and it leaves dead devices."""

import jax
import numpy as np
import pytest

from eplb_jax.placement.placement import rebalance_experts
from eplb_jax.placement.quality import balancedness, count_duplicates, count_moves
from eplb_jax.placement.refine import refine_placement
from eplb_jax.placement.soft import home_nodes
from tests.eplb.placement.cases import (
    DEVICES,
    EXPERTS,
    LAYERS,
    REPLICAS,
    SIZES,
    lognormal,
)


@pytest.fixture
def drifted():
    """A placement of one load, and another load not far from it."""
    old_weight = lognormal(0)
    placement = rebalance_experts(old_weight, *SIZES, policy="global")[0]
    return old_weight * lognormal(1, sigma=0.5), placement


@pytest.mark.parametrize("max_moves", [0, 1, 2, 3, 7, 20, REPLICAS])
def test_the_budget_is_kept_and_moves_pay(drifted, max_moves):
    weight, old = drifted
    new, moves = refine_placement(weight, old, DEVICES, max_moves=max_moves)
    changed = (np.asarray(new) != np.asarray(old)).sum(axis=1)
    assert moves.tolist() == changed.tolist()
    assert changed.max() <= max_moves
    assert (np.asarray(count_moves(old, new, DEVICES)) <= changed).all()
    was, now = (np.asarray(balancedness(weight, p, DEVICES)) for p in (old, new))
    assert (now >= was).all()
    for layer in np.asarray(new):
        assert set(layer) == set(range(EXPERTS))
    if max_moves >= 20:
        assert (now > was + 0.05).all()


def test_more_moves_are_no_worse(drifted):
    weight, old = drifted

    def score(budget):
        new, _ = refine_placement(weight, old, DEVICES, max_moves=budget)
        return np.asarray(balancedness(weight, new, DEVICES)).mean()

    scores = [score(budget) for budget in (0, 4, 8, 16, 32)]
    assert scores == sorted(scores)
    assert scores[-1] > 0.97


def test_a_steady_load_causes_no_moves(drifted):
    weight, old = drifted
    first, _ = refine_placement(weight, old, DEVICES, max_moves=REPLICAS)
    again, moves = refine_placement(weight, first, DEVICES, max_moves=REPLICAS)
    assert moves.tolist() == [0] * LAYERS
    np.testing.assert_array_equal(first, again)


def test_a_greater_least_gain_makes_fewer_moves(drifted):
    weight, old = drifted

    def count(gain):
        _, moves = refine_placement(
            weight, old, DEVICES, max_moves=REPLICAS, min_gain=gain
        )
        return np.asarray(moves)[is_separate].sum()

    # Replicas on one device are separated regardless of the gain.
    is_separate = np.asarray(count_duplicates(old, DEVICES)) == 0
    assert is_separate.any()
    counts = [count(gain) for gain in (1e-6, 1e-3, 1e-2, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 0


def test_replicas_on_one_device_are_separated():
    old = np.tile(np.arange(REPLICAS) % EXPERTS, (LAYERS, 1))
    old[:, 1] = old[:, 0]
    old[:, EXPERTS] = 1  # expert 1 keeps a replica
    separated, _ = refine_placement(
        np.ones((LAYERS, EXPERTS)), old, DEVICES, max_moves=4
    )
    assert not np.asarray(count_duplicates(separated, DEVICES)).any()


@pytest.mark.slow
def test_replicas_on_one_device_stay_on_request():
    old = np.tile(np.arange(REPLICAS) % EXPERTS, (LAYERS, 1))
    old[:, 1] = old[:, 0]
    old[:, EXPERTS] = 1  # expert 1 keeps a replica
    left, moves = refine_placement(
        np.ones((LAYERS, EXPERTS)),
        old,
        DEVICES,
        max_moves=4,
        separate=False,
        min_gain=0.5,
    )
    assert moves.tolist() == [0] * LAYERS
    np.testing.assert_array_equal(left, old)


def test_the_experts_of_a_dead_device_come_back(drifted):
    weight, old = drifted
    capacity = np.ones(DEVICES, np.float32)
    capacity[7] = 0
    new, moves = refine_placement(
        weight, old, DEVICES, max_moves=6, device_capacity=capacity
    )
    new = np.asarray(new)
    assert (new[:, 28:32] == -1).all()
    for layer in new:
        assert set(layer) - {-1} == set(range(EXPERTS))
    assert np.asarray(moves).max() <= 6
    more, _ = refine_placement(
        weight, new, DEVICES, max_moves=REPLICAS, device_capacity=capacity
    )
    score = np.asarray(balancedness(weight, more, DEVICES, capacity))
    assert score.min() > 0.95


def refine_inside_jit(weight, old, capacity, max_moves):
    """Refines with everything traced, so that no value is checked."""
    return jax.jit(
        lambda *args: refine_placement(
            *args[:2], DEVICES, device_capacity=args[2], max_moves=args[3]
        )
    )(weight, old, capacity, max_moves)


def test_a_budget_too_small_for_a_dead_device_loses_no_expert(drifted):
    weight, old = drifted
    old, capacity = np.asarray(old), np.ones(DEVICES, np.float32)
    capacity[7] = 0
    alive = np.delete(old.reshape(LAYERS, DEVICES, -1), 7, axis=1)
    needed = [EXPERTS - len(set(layer.ravel())) for layer in alive]
    assert max(needed) > 1
    new, moves = refine_inside_jit(weight, old, capacity, 1)
    assert moves.tolist() == [min(1, number) for number in needed] or max(moves) <= 1
    for layer, now in enumerate(np.asarray(new)):
        assert set(now) - {-1} == set(range(EXPERTS))
        stayed = now[28:32]
        assert (stayed >= 0).sum() == max(needed[layer] - 1, 0)
        assert ((stayed == -1) | (stayed == old[layer, 28:32])).all()
    with pytest.raises(ValueError, match=f"use max_moves={max(needed)} or more"):
        refine_placement(weight, old, DEVICES, max_moves=1, device_capacity=capacity)


def test_a_lost_expert_comes_back_whatever_its_load():
    # All other load together is a millionth of expert 0's.
    weight = np.full((LAYERS, EXPERTS), 1e-8, np.float32)
    weight[:, 0] = 1
    old = np.tile(np.arange(REPLICAS) % EXPERTS, (LAYERS, 1))
    old[:, EXPERTS] = 1
    capacity = np.ones(DEVICES, np.float32)
    capacity[0] = 0
    new, _ = refine_placement(
        weight, old, DEVICES, max_moves=8, device_capacity=capacity
    )
    for layer in np.asarray(new):
        assert set(layer) - {-1} == set(range(EXPERTS))


def test_no_expert_gets_more_replicas_than_the_tables_hold(drifted):
    weight = np.ones((LAYERS, EXPERTS), np.float32)
    weight[:, 20] = 100  # which has one replica
    old = np.tile(np.arange(REPLICAS) % EXPERTS, (LAYERS, 1))
    most = []
    for max_replicas in (2, 3, None):
        new, moves = refine_placement(
            weight, old, DEVICES, max_moves=REPLICAS, max_replicas=max_replicas
        )
        most.append(max(np.bincount(layer).max() for layer in np.asarray(new)))
        assert np.asarray(moves).all()
    assert most[:2] == [2, 3] and most[2] > 3


def test_empty_physical_experts_are_filled():
    weight = lognormal(2)
    old = np.tile(np.arange(REPLICAS) % EXPERTS, (LAYERS, 1))
    old[:, EXPERTS:] = -1  # four devices hold nothing
    new, moves = refine_placement(weight, old, DEVICES, max_moves=REPLICAS)
    assert (np.asarray(new) >= 0).all()
    assert np.asarray(balancedness(weight, new, DEVICES)).min() > 0.95
    _, moves = refine_placement(weight, new, DEVICES, max_moves=REPLICAS)
    assert moves.tolist() == [0] * LAYERS
    # A slow device that has its share already gets no more.
    capacity = np.ones(DEVICES, np.float32)
    capacity[11] = 1e-3
    old = np.array(new)
    old[:, -4:-1] = -1
    slow, _ = refine_placement(
        weight, old, DEVICES, max_moves=4, device_capacity=capacity, separate=False
    )
    assert (np.asarray(slow)[:, -4:-1] == -1).all()


def test_a_device_that_comes_back_is_filled(drifted):
    weight, old = drifted
    gone = np.array(old)
    gone[:, 28:32] = -1
    capacity = np.ones(DEVICES, np.float32)
    capacity[7] = 0
    gone, _ = refine_placement(
        weight, gone, DEVICES, max_moves=REPLICAS, device_capacity=capacity
    )
    back, _ = refine_placement(weight, gone, DEVICES, max_moves=REPLICAS)
    assert (np.asarray(back)[:, 28:32] >= 0).all()
    score = np.asarray(balancedness(weight, back, DEVICES))
    assert score.min() > 0.95


@pytest.mark.slow
def test_the_last_replica_at_home_stays():
    weight = lognormal(3)
    home = home_nodes(weight, 8, 4)
    old = rebalance_experts(weight, *SIZES, policy="hierarchical")[0]
    later = weight * lognormal(4)
    new, _ = refine_placement(
        later,
        old,
        DEVICES,
        max_moves=REPLICAS,
        home=home,
        num_nodes=4,
        remote_price=0.0,
    )
    new, home = np.asarray(new), np.asarray(home)
    node = np.arange(REPLICAS) // 12
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        assert home[layer, expert] in node[new[layer] == expert]
    assert (new != np.asarray(old)).any()


@pytest.mark.slow
def test_same_in_jit_and_under_vmap(drifted):
    weight, old = drifted

    def refine(weight, old, capacity):
        return refine_placement(
            weight, old, DEVICES, max_moves=8, device_capacity=capacity
        )

    capacity = np.ones(DEVICES, np.float32)
    two = np.stack([weight, weight[::-1]])
    both = jax.jit(jax.vmap(refine, (0, None, None)))(two, old, capacity)
    for i in range(2):
        for one, other in zip(refine(two[i], old, capacity), both, strict=True):
            np.testing.assert_array_equal(one, other[i])
