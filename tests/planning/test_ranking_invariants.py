"""What holds for every ranking, whatever the numbers are."""

import random

from hypothesis import given, settings, strategies as st

from dualpipe_jax import Costs, Remat, StageMemory, rank_schedules
from tests.planning.rankings import ALL

# Times that differ by less are ranked by memory.
SAME = 1 + 1e-8

positive = st.floats(0.1, 100)
costs_of = st.builds(
    lambda f, i, w, hidden, p2p: Costs(
        F=f, I=i, W=w, FB=(1 - hidden) * (f + i + w), p2p=p2p
    ),
    positive,
    positive,
    positive,
    st.floats(0, 0.6),
    st.floats(0, 5),
)
memories = st.builds(
    StageMemory,
    residuals=positive,
    wgrad_residuals=positive,
    parameters=positive,
    gradients=positive,
    message=positive,
    workspace=positive,
    at_rest=st.none() | positive,
)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def keys(candidates):
    return [(each.schedule, each.num_microbatches, each.remat) for each in candidates]


@quick
@given(costs_of, memories, st.floats(1, 3000), st.floats(1, 4))
def test_more_memory_never_makes_the_best_slower(costs, memory, limit, more):
    remat = Remat("half", memory.residuals / 2, memory.wgrad_residuals)
    poor, rich = (
        rank_schedules(4, [8, 16], costs, memory, limit=each, remat=remat)
        for each in (limit, limit * more)
    )
    assert set(keys(poor.fitting)) <= set(keys(rich.fitting))
    assert sorted(keys(poor.candidates)) == sorted(keys(rich.candidates))
    if poor.best:
        assert rich.best.time <= poor.best.time * SAME
        assert all(each.time * SAME >= poor.best.time for each in poor.fitting)
    for ranking in (poor, rich):
        assert all(each.memory.total <= ranking.limit for each in ranking.fitting)
        unfit = ranking.candidates[len(ranking.fitting) :]
        assert all(each.memory.total > ranking.limit for each in unfit)
        assert all(each.reason for each in ranking.candidates)


@quick
@given(costs_of, memories, st.randoms(use_true_random=False))
def test_neither_order_nor_unit_matters(costs, memory, rng: random.Random):
    limit = 20 * memory.residuals + 4 * memory.parameters
    names, sizes = ALL.copy(), [8, 16]
    first = rank_schedules(
        4, sizes, costs, memory, limit=limit, schedules=names, measured_at=8
    )
    rng.shuffle(names)
    rng.shuffle(sizes)
    seconds = Costs(
        **{name: value / 1024 for name, value in vars(costs).items()}
    )  # a power of two: exact
    again = rank_schedules(
        4, sizes, seconds, memory, limit=limit, schedules=names, measured_at=8
    )
    # Ties (1F1B and GPipe at p2p = 0) are ranked by memory, which differs.
    assert keys(first.candidates) == keys(again.candidates)
    for a, b in zip(first.candidates, again.candidates, strict=True):
        assert a.time == b.time * 1024


@quick
@given(costs_of, memories, st.floats(1, 3000))
def test_more_choice_never_makes_the_best_slower(costs, memory, limit):
    few = rank_schedules(4, 8, costs, memory, limit=limit)
    remat = Remat("full", 0, memory.wgrad_residuals, cost=0)
    more = rank_schedules(4, [8, 16], costs, memory, limit=limit, remat=remat)
    assert set(keys(few.candidates)) <= set(keys(more.candidates))
    if few.best:
        assert more.best.time <= few.best.time * SAME
