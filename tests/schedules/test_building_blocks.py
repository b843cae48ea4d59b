"""V-Half and V-Min: the formulas of "Pipeline Parallelism with Controllable Memory"."""

import itertools

import pytest

from dualpipe_jax.schedules.generators.v_half import v_half
from dualpipe_jax.schedules.generators.v_min import v_min
from dualpipe_jax.schedules.simulator import Costs, simulate

RANKS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(("make", "part", "more"), [(v_half, 2, 2), (v_min, 3, 4)])
def test_memory(make, part, more, num_ranks):
    """(P+2) // 2 and (P+4) // 3 activations of whole stages, each two of a half."""
    most = 2 * ((num_ranks + more) // part)
    for num_microbatches in (1, 2, num_ranks, num_ranks + 1, 5 * num_ranks):
        timeline = simulate(make(num_ranks, num_microbatches))
        assert max(timeline.peak_activations) <= most
        if num_microbatches >= num_ranks:
            assert max(timeline.peak_activations) == most


@pytest.mark.parametrize("num_ranks", RANKS)
def test_bubbles_at_equal_costs(num_ranks):
    """About P / 2M and 2P / 3M of the work, which is 6M for M microbatches here."""
    for num_microbatches in (num_ranks, 2 * num_ranks + 1, 5 * num_ranks):
        half, third = (
            simulate(make(num_ranks, num_microbatches)).makespan - 6 * num_microbatches
            for make in (v_half, v_min)
        )
        assert half < 3 * num_ranks and third < 4 * num_ranks
        if num_microbatches > num_ranks > 2:
            assert half == 3 * num_ranks - (4 if num_ranks % 2 else 7)
            assert third == 4 * num_ranks - (5 if num_ranks % 3 else 7)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7, 8])
def test_v_half_does_not_wait_in_its_steady_state(num_ranks):
    """If 2F <= W + 2I and 2I <= W + 2F, more microbatches cost their work only."""
    waits = set()
    for f, i, w in itertools.product((2, 3, 5), repeat=3):
        few, many = (
            simulate(v_half(num_ranks, m * num_ranks), Costs(F=f, I=i, W=w)).makespan
            for m in (3, 6)
        )
        work = 2 * 3 * num_ranks * (f + i + w)
        if 2 * f <= w + 2 * i and 2 * i <= w + 2 * f:
            assert many - few == work
        waits.add(many - few > work)
    assert waits == {False, True}  # at other costs, there are waits
