"""The measures against loops over experts; the bound against all placements."""

import itertools

import jax
import numpy as np
import pytest

from eplb_jax.placement.quality import (
    balancedness,
    balancedness_bound,
    count_duplicates,
    count_moves,
    device_loads,
    remote_share,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_loads_and_balancedness_against_a_loop(rng):
    weight = rng.lognormal(0, 1, (3, 5)).astype(np.float32)
    placement = np.concatenate(
        [np.tile(np.arange(5), (3, 1)), rng.integers(-1, 5, (3, 7))], axis=1
    )
    capacity = np.array([1.0, 0.5, 2.0, 0.0], np.float32)
    placement[:, 9:] = -1
    load = np.zeros((3, 4))
    for layer, physical in itertools.product(range(3), range(12)):
        expert = placement[layer, physical]
        if expert >= 0:
            count = (placement[layer] == expert).sum()
            load[layer, physical // 3] += weight[layer, expert] / count
    # rtol: float32 quotients and sums against float64 ones
    np.testing.assert_allclose(device_loads(weight, placement, 4), load, rtol=1e-6)
    plain = load.mean(axis=1) / load.max(axis=1)
    np.testing.assert_allclose(balancedness(weight, placement, 4), plain, rtol=1e-6)
    scaled = load[:, :3] / capacity[:3]
    scaled = load.sum(axis=1) / capacity.sum() / scaled.max(axis=1)
    np.testing.assert_allclose(
        balancedness(weight, placement, 4, capacity), scaled, rtol=1e-6
    )


def test_a_layer_without_load_is_balanced():
    assert balancedness(np.zeros((1, 2)), [[0, 1]], 2).tolist() == [1.0]
    assert balancedness_bound(np.zeros((1, 2)), 4, 2).tolist() == [1.0]


@pytest.mark.parametrize(
    "num_experts, num_replicas, num_devices", [(2, 6, 3), (3, 5, 5)]
)
def test_no_placement_exceeds_the_bound(rng, num_experts, num_replicas, num_devices):
    every = np.array(
        [
            placement
            for placement in itertools.product(range(num_experts), repeat=num_replicas)
            if len(set(placement)) == num_experts
        ]
    )
    score = jax.jit(balancedness, static_argnums=2)
    weight = rng.lognormal(0, 2, (20, num_experts)).astype(np.float32)
    bound = np.asarray(balancedness_bound(weight, num_replicas, num_devices))
    weights = [np.broadcast_to(row, (len(every), num_experts)) for row in weight]
    best = np.array([score(row, every, num_devices).max() for row in weights])
    assert (best <= bound * (1 + 1e-6)).all()  # rounding of float32 sums
    is_reached = best >= bound * (1 - 1e-6)
    # With one physical expert per device only the heaviest replica matters.
    assert is_reached.all() if num_replicas == num_devices else is_reached.any()


def test_moves_and_duplicates_against_multisets(rng):
    old = rng.integers(0, 6, (20, 12))
    new = rng.integers(-1, 6, (20, 12))
    moves, duplicates = [], []
    for before, after in zip(old, new, strict=True):
        moves.append(0)
        duplicates.append(0)
        for gpu in range(4):
            had = list(before[3 * gpu : 3 * gpu + 3])
            has = [e for e in after[3 * gpu : 3 * gpu + 3] if e >= 0]
            duplicates[-1] += len(has) - len(set(has))
            for expert in has:
                if expert in had:
                    had.remove(expert)
                else:
                    moves[-1] += 1
    assert count_moves(old, new, 4).tolist() == moves
    assert count_duplicates(new, 4).tolist() == duplicates


def test_remote_share(rng):
    home = np.array([[0, 0, 1, 1]])
    placement = np.array([[0, 1, 2, 2, 3, 0]])
    weight = np.array([[6.0, 1.0, 4.0, 5.0]])
    # Expert 0 has its second replica away (3.0), expert 2 its first (2.0).
    share = remote_share(weight, placement, home, 2)
    np.testing.assert_allclose(share, [5 / 16], rtol=1e-6)  # one float32 division


@pytest.mark.parametrize(
    "placement, capacity, message",
    [
        ([[0, 1, 2, 3]], None, "holds 3, but weight has 3 experts"),
        ([[0, 1, 2, -2]], None, "holds -2, but weight has 3 experts"),
        ([[0, 1, 1, -1]], None, "Expert 2 of layer 0 has no replica"),
        ([[0.0, 1.0, 2.0, 0.0]], None, r"is float64\[1, 4\], but experts are integers"),
        ([[0, 1, 2, 0]], [1, 1, 1], r"has shape \(3,\), but there are 2 devices"),
        ([[0, 1, 2, 0]], [1, -1], "must be finite and not negative"),
        ([[0, 1, 2, 0]], [1, np.nan], "must be finite and not negative"),
        ([[0, 1, 2, 0]], [0, 0], "leaves 0 of 2 devices alive"),
        ([[0, 1, 2, 0]], [1, 0], "Device 1 has load in layer 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(placement, capacity, message):
    with pytest.raises(ValueError, match=message):
        balancedness([[6.0, 2.0, 1.0]], placement, 2, capacity)


def test_inside_jit_load_that_is_never_done_scores_nothing():
    score = jax.jit(balancedness, static_argnums=2)
    weight = np.array([[6.0, 2.0, 1.0]])
    even = np.ones(2, np.float32)
    good = np.array([[0, 1, 2, 0]])
    assert score(weight, good, 2, even) > 0
    for placement, capacity in (
        ([[0, 1, 1, -1]], even),
        ([[0, 1, 3, 7]], even),
        (good, [1, 0]),
        (good, [0, 0]),
    ):
        capacity = np.asarray(capacity, np.float32)
        assert score(weight, np.asarray(placement), 2, capacity) == 0
    # Experts without load may be anywhere.
    idle = np.array([[6.0, 2.0, 0.0]])
    assert score(idle, np.array([[0, 1, 1, -1]]), 2, even) > 0
    on_dead = np.array([[0, 1, 2, -1]])
    assert score(idle, on_dead, 2, np.float32([1, 0])) == 1


def test_no_score_is_above_one(rng):
    # Sums of float32 numbers round: a mean may come out above the largest.
    weight = rng.lognormal(0, 1, (500, 1)).astype(np.float32)
    weight = np.repeat(weight, 12, axis=1)
    placement = np.tile(np.arange(12), (500, 1))
    for devices in (1, 3, 12):
        score = np.asarray(balancedness(weight, placement, devices))
        assert ((score <= 1) & (score > 1 - 1e-6)).all()


@pytest.mark.parametrize(
    "num_replicas, num_devices, message",
    [
        (2, 2, "num_replicas=2 is less than the number of experts 3"),
        (4, 3, "num_replicas=4 must be a multiple of num_gpus=3"),
        (4, 0, "num_gpus=0 must be a positive int"),
    ],
)
def test_sizes_without_a_bound_are_refused(num_replicas, num_devices, message):
    with pytest.raises(ValueError, match=message):
        balancedness_bound([[6.0, 2.0, 1.0]], num_replicas, num_devices)


def test_a_placement_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 5\) cannot be divided among"):
        balancedness([[1.0, 2.0]], np.zeros((1, 5), int), 2)
