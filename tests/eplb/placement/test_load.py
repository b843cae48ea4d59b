"""Estimates inside a step, and states that survive a restart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eplb_jax.placement.load import (
    moving_average,
    restore_state,
    save_state,
    sum_of_last,
)

COUNTS = np.random.default_rng(0).integers(0, 100, (9, 3, 5))


def run(estimator, counts):
    def step(state, counts):
        state = estimator.observe(state, counts)
        return state, estimator.estimate(state)

    return jax.jit(lambda c: lax.scan(step, estimator.init(3, 5), c))(counts)


@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_sum_of_last(num_steps):
    _, estimates = run(sum_of_last(num_steps), COUNTS)
    for i in range(len(COUNTS)):
        window = COUNTS[max(0, i + 1 - num_steps) : i + 1]
        np.testing.assert_array_equal(estimates[i], window.sum(axis=0))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_moving_average(decay):
    _, estimates = run(moving_average(decay), COUNTS)
    for i in range(len(COUNTS)):
        weights = decay ** np.arange(i, -1, -1.0)
        expected = np.average(COUNTS[: i + 1], axis=0, weights=weights)
        # rtol: float32 sums of nine terms
        np.testing.assert_allclose(estimates[i], expected, rtol=1e-5)


def test_a_window_goes_on_when_its_counter_ends():
    window = sum_of_last(3)
    state = window.init(1, 2)
    # 2^31 - 2 steps have been seen, by a version that counted them all.
    state = state._replace(num_seen=jnp.int32(2**31 - 2))
    for step in range(1, 7):
        state = window.observe(state, jnp.full((1, 2), step))
        expected = sum(range(max(step - 2, 1), step + 1))
        assert window.estimate(state).tolist() == [[expected, expected]]


@pytest.mark.parametrize("estimator", [sum_of_last(4), moving_average(0.9)])
def test_sums_beyond_the_range_of_float32(estimator):
    counts = np.array([[3e38, 1.5e38, 0]], np.float32)
    state = estimator.init(1, 3)
    for _ in range(30):
        state = estimator.observe(state, counts)
        estimate = np.asarray(estimator.estimate(state), np.float64)
        # rtol: a rounding of float32 for each step
        np.testing.assert_allclose(estimate[0] / estimate[0, 0], [1, 0.5, 0], rtol=1e-5)


def test_before_the_first_step_there_is_no_load():
    for estimator in (sum_of_last(3), moving_average(0.9)):
        assert not np.asarray(estimator.estimate(estimator.init(2, 4))).any()


@pytest.mark.parametrize("estimator", [sum_of_last(4), moving_average(0.9)])
def test_a_restored_state_continues_like_the_original(estimator, tmp_path):
    state, _ = run(estimator, COUNTS[:6])
    save_state(tmp_path / "state.npz", state)
    restored = restore_state(tmp_path / "state.npz", estimator.init(3, 5))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for counts in COUNTS[6:]:
        state = estimator.observe(state, jnp.asarray(counts))
        restored = estimator.observe(restored, jnp.asarray(counts))
    one, other = estimator.estimate(state), estimator.estimate(restored)
    np.testing.assert_array_equal(one, other)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        sum_of_last(0)
    with pytest.raises(ValueError, match=r"num_steps=2\.5 must be at least 1, an int"):
        sum_of_last(2.5)
    with pytest.raises(ValueError, match=r"decay=1.0 must be in \[0, 1\)"):
        moving_average(1.0)
    average = moving_average(0.9)
    state = average.init(2, 4)
    with pytest.raises(ValueError, match=r"counts has shape \(4,\), but the state"):
        average.observe(state, jnp.ones(4))
    with pytest.raises(ValueError, match="counts is complex64"):
        average.observe(state, jnp.ones((2, 4), jnp.complex64))
    save_state(tmp_path / "state", state)
    with pytest.raises(ValueError, match="saved by another estimator"):
        restore_state(tmp_path / "state", sum_of_last(2).init(2, 4))
    with pytest.raises(ValueError, match="saved with other sizes"):
        restore_state(tmp_path / "state", average.init(2, 8))
    content = (tmp_path / "state.npz").read_bytes()
    (tmp_path / "state.npz").write_bytes(content[:-30])
    with pytest.raises(ValueError, match=r"state cannot be read: .*not a zip"):
        restore_state(tmp_path / "state", average.init(2, 4))
