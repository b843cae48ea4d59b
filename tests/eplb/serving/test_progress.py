"""Plans that must not get stuck, devices that return, and counters that end."""

import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax.placement.load import sum_of_last
from eplb_jax.placement.quality import balancedness
from eplb_jax.placement.refine import refine_placement
from tests.eplb.serving.test_balancer import (
    EXPERTS,
    LAYERS,
    draw,
    follow,
    make,
)

INT32_MAX = 2**31 - 1


def few_loads():
    """Loads [layers, 16] for eight devices of two: shared peaks, and random ones."""
    tied = np.array([10.0] * 8 + [1.0] * 8)
    rng = np.random.default_rng(0)
    random = [rng.lognormal(0, sigma, 16) for sigma in (0.5, 1, 1.5) for _ in range(4)]
    return np.stack([tied, tied * np.linspace(1, 1.01, 16), *random]).astype(np.float32)


def settle(step, state, counts, most=60):
    """Steps until two plans in a row change nothing; returns the state and moves."""
    moves, quiet = [], 0
    for _ in range(most):
        state, plan = step(state, counts)
        moves.append(int(plan.num_moves.max()))
        quiet = 0 if moves[-1] else quiet + 1
        if quiet == 2:
            return state, moves
    raise AssertionError("it never settles")


@pytest.mark.slow
def test_small_plans_reach_what_a_large_one_does():
    counts = few_loads()
    num_layers = len(counts)
    balancer = make(
        num_layers=num_layers, num_experts=16, num_physical_experts=16, num_devices=8
    )
    assert balancer.move_budget == 2
    start = balancer.init()
    state, moves = settle(follow(balancer), start, counts)
    assert max(moves) == 2
    large, _ = refine_placement(
        counts, start.tables.physical_to_logical_map, 8, max_moves=16
    )
    reached = np.asarray(balancedness(counts, large, 8))
    score = np.asarray(balancedness(counts, state.tables.physical_to_logical_map, 8))
    assert score[0] == 1
    assert (score >= 0.98 * reached).all()


@pytest.mark.slow
def test_a_device_that_returns_or_recovers_is_used():
    # One of 16 devices hardly shows in the balancedness, which is above `below`.
    devices, per_device, experts = 16, 3, 32
    rng = np.random.default_rng(0)
    counts = draw(rng, rng.lognormal(sigma=0.3, size=(1, experts)))
    balancer = make(
        num_layers=1,
        num_experts=experts,
        num_physical_experts=devices * per_device,
        num_devices=devices,
        below=0.5,
    )
    step = follow(balancer)

    def with_speed(state, speed):
        return balancer.with_capacity(
            state, np.where(np.arange(devices) == 5, speed, 1)
        )

    def of_device_5(state):
        placement = np.asarray(state.tables.physical_to_logical_map)
        weight = counts / np.bincount(placement[placement >= 0], minlength=experts)
        held = placement.reshape(devices, per_device)[5]
        held = held[held >= 0]
        return len(held), weight[0, held].sum() / counts.sum() * devices

    state, _ = settle(step, with_speed(balancer.init(), 0), counts)
    assert of_device_5(state) == (0, 0)
    state, moves = settle(step, with_speed(state, 1), counts)
    number, share = of_device_5(state)
    assert number == per_device and share > 0.7
    assert sum(m > 0 for m in moves) <= 6  # within a few plans
    state, _ = settle(step, with_speed(state, 0.5), counts)
    assert of_device_5(state)[1] < 0.65
    state, _ = settle(step, with_speed(state, 1), counts)
    assert of_device_5(state)[1] > 0.7
    # Without another change of speed, nothing is due.
    assert not np.asarray(state.is_due).any()
    assert step._cache_size() == 1


@pytest.mark.slow
def test_narrow_tables_are_no_obstacle():
    # Expert 7 would get four replicas; the tables hold two.
    popularity = np.ones((LAYERS, EXPERTS))
    popularity[:, 7] = 30
    counts = draw(np.random.default_rng(0), popularity)
    balancer = make(max_replicas=2, max_moves=4)
    state, moves = settle(follow(balancer), balancer.init(), counts)
    assert sum(moves) > 0
    assert int(state.tables.expert_count.max()) == 2
    state.tables.validate()
    assert balancer.metrics(state)["num_rejected"] == 0


def test_counters_stop_or_go_on():
    balancer = make(every=7)
    state = balancer.init()
    counts = np.ones((LAYERS, EXPERTS))
    plan = balancer.plan(state)
    plan = plan._replace(
        num_moves=jnp.full(LAYERS, 5, jnp.int32),
        is_rejected=jnp.ones(LAYERS, bool),
        is_refused=jnp.bool_(True),
    )
    full = jnp.int32(INT32_MAX - 1)
    state = state._replace(num_moves=full, num_refused=full, num_rejected=full)
    for _ in range(2):
        state = balancer.switch(state, plan)
    for name in ("num_moves", "num_refused", "num_rejected"):
        assert int(getattr(state, name)) == INT32_MAX
    # Of the steps, their remainder goes on as if there were no end.
    state = state._replace(step=jnp.int32(INT32_MAX - 10))
    for number in range(INT32_MAX - 9, INT32_MAX + 20):
        state = balancer.observe(state, counts)
        assert int(state.step) > 0
        assert int(state.step) % 7 == number % 7


def test_a_power_of_two_does_not_change_the_plans():
    rng = np.random.default_rng(1)
    counts = draw(rng, rng.lognormal(sigma=1.0, size=(LAYERS, EXPERTS)), 1000)
    balancer = make(estimator=sum_of_last(2))
    step, states = follow(balancer), {}
    for power in (0, -120, 119):  # the sum of two steps is infinite
        state = balancer.init()
        for _ in range(3):
            state, _ = step(state, np.ldexp(counts.astype(np.float32), power))
        states[power] = np.asarray(state.tables.physical_to_logical_map)
        assert int(state.num_moves) > 0
    for power in (-120, 119):
        np.testing.assert_array_equal(states[power], states[0])
