"""Times and bytes of ranked schedules, against closed formulas and counts by hand."""

import pytest

from dualpipe_jax import Costs, Remat, StageMemory, rank_schedules
from tests.planning.rankings import ALL, DEEPSEEK, NOTHING

# Sums of times are equal but for the order in which they are added.
EXACT = {"rel": 1e-12}


def only(ranking):
    (candidate,) = ranking.candidates
    return candidate


def time_of(name, ranks, microbatches, costs, **kwargs):
    kwargs = {"limit": 1, "schedules": [name]} | kwargs
    return only(rank_schedules(ranks, microbatches, costs, NOTHING, **kwargs)).time


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 3, 16])
def test_times_of_1f1b_and_gpipe_are_the_published_formula(ranks, microbatches):
    costs = Costs(F=2, I=3, W=1.5, B=4)
    expected = (microbatches + ranks - 1) * (2 + 4)
    for name in ("1f1b", "gpipe"):
        assert time_of(name, ranks, microbatches, costs) == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("per_rank", [2, 3])
def test_times_of_split_schedules_are_the_published_formulas(ranks, per_rank):
    """ZB-H1: (P-1)(F+B-2W); DualPipe: (P/2-1)(F&B+B-3W); V: twice as many halves."""
    size = per_rank * ranks
    times = {name: time_of(name, ranks, size, Costs()) for name in ALL}
    assert times["zb1p"] == pytest.approx(3 * size + (ranks - 1) * 1, **EXACT)
    assert times["dualpipe"] == pytest.approx(3 * size + (ranks / 2 - 1) * 2, **EXACT)
    # Each of its stages is half of one: M microbatches in 2 halves, half the bubble.
    assert times["dualpipev"] == pytest.approx(
        3 * size + (ranks - 1) * 2 * 0.5, **EXACT
    )


def test_what_does_not_shrink_with_microbatches_and_stages():
    costs = Costs(F=10, I=20, W=6, p2p=4)
    # One rank, so no bubble: 4 times (F + B), of which 1 each does not become smaller.
    assert time_of("1f1b", 1, 4, costs, measured_at=2) == pytest.approx(4 * 36 / 2)
    assert time_of(
        "1f1b", 1, 4, costs, measured_at=2, task_overhead=1
    ) == pytest.approx(4 * (1 + 9 / 2 + 1 + 25 / 2))
    # An overhead larger than the whole cost leaves the cost.
    large = only(
        rank_schedules(
            2, 8, costs, NOTHING, limit=1, schedules="dualpipev", task_overhead=7
        )
    ).costs
    assert (large.F, large.W, large.p2p) == (7 + 3 / 2, 6, 4)
    # A message is half as large if the microbatch is, whatever the stages.
    large = only(
        rank_schedules(
            2, 8, costs, NOTHING, limit=1, measured_at=4, schedules="dualpipev"
        )
    )
    assert (large.costs.F, large.costs.p2p) == (10 / 4, 2)  # fmt: skip


def test_what_is_paid_once_per_step():
    costs = Costs()
    for name, moved in (("1f1b", 0), ("zb1p", 0), ("dualpipe", 1), ("dualpipev", 1)):
        plain = time_of(name, 4, 8, costs)
        extra = time_of(name, 4, 8, costs, update_time=5, exchange_time=100) - plain
        assert extra == pytest.approx(5 + 100 * moved), name


HELD = {
    # Of P=4, M=8, in stages of P: parameters, gradients, residuals, wgrad residuals,
    # messages.
    "1f1b": (1, 1, 4, 0, 2),
    "zb1p": (1, 1, 4, 4, 2),
    "gpipe": (1, 1, 8, 0, 9),
    "dualpipe": (3, 2, 5, 2, 3),  # its own at rest, and two to run
    "dualpipev": (2, 1, 4.5, 2, 3),  # two halves to run, from other ranks
    "zbv": (2, 1, 4, 3.5, 4),
    "v_half": (2, 1, 3, 2, 3),
    "v_min": (2, 1, 2, 1, 3),
    "interleaved_1f1b": (2, 1, 5.5, 0, 4),
    "interleaved_zero_bubble": (2, 1, 4, 2, 5),
    "looped_bfs": (2, 1, 8, 0, 9),
}


@pytest.mark.parametrize("name", HELD)
def test_memory_by_hand(name):
    memory = StageMemory(
        residuals=10,
        wgrad_residuals=1000,
        parameters=2,
        gradients=5,
        optimizer=7,
        message=100,
        workspace=3,
        pair_workspace=4,
        other=11,
    )
    ranked = only(rank_schedules(4, 8, DEEPSEEK, memory, limit=1, schedules=[name]))
    params, grads, residuals, wgrad_residuals, messages = HELD[name]
    expected = {
        "parameters": 2 * params,
        "gradients": 5 * grads,
        "optimizer": 7,
        "residuals": 10 * residuals,
        "wgrad_residuals": 1000 * wgrad_residuals,
        "messages": 100 * messages,
        "workspace": 4 if name.startswith("dualpipe") else 3,
        "other": 11,
    }
    assert vars(ranked.memory) == expected
    assert ranked.memory.total == sum(expected.values())
    assert ranked.spare == 1 - ranked.memory.total
    assert not ranked.fits


@pytest.mark.parametrize(
    ("name", "copies"), [("1f1b", 1), ("dualpipe", 2), ("dualpipev", 1)]
)
def test_parameters_at_rest_elsewhere_are_gathered(name, copies):
    memory = StageMemory(0, 0, parameters=16, gradients=0, at_rest=1)
    ranked = only(rank_schedules(4, 8, Costs(), memory, limit=1, schedules=[name]))
    assert ranked.memory.parameters == 1 + 16 * copies


def test_more_microbatches_are_smaller_ones():
    memory = StageMemory(8, 4, 1, 2, message=2, workspace=6)
    ranking = rank_schedules(4, [8, 16], Costs(), memory, limit=1, schedules="zb1p")
    small, large = sorted(ranking.candidates, key=lambda c: -c.num_microbatches)
    assert large.memory.workspace == 6
    back = rank_schedules(
        4, 8, Costs(), memory, limit=1, schedules="zb1p", measured_at=16
    )
    assert only(back).memory.workspace == 12
    # The workspace may be weight gradients, which are as large as ever.
    halves = ("residuals", "wgrad_residuals", "messages")
    for name, bytes_of in vars(large.memory).items():
        share = 0.5 if name in halves else 1
        assert vars(small.memory)[name] == share * bytes_of, name


def test_recomputation_costs_time_and_spares_memory():
    memory = StageMemory(residuals=8, wgrad_residuals=1, parameters=0, gradients=0)
    full = Remat("full", residuals=2, wgrad_residuals=4)
    some = Remat(
        "some", residuals=5, wgrad_residuals=2, cost=1, overlapped_cost=0.5, workspace=9
    )
    costs = Costs(F=3, I=4, W=2, FB=7)
    ranking = rank_schedules(
        4, 8, costs, memory, limit=1, remat=[full, some], schedules=["dualpipe"]
    )
    found = {each.remat: each for each in ranking.candidates}
    assert found["none"].costs == costs
    assert found["full"].costs == Costs(F=3, I=7, W=2, B=9, FB=10)
    assert found["some"].costs == Costs(F=3, I=5, W=2, B=7, FB=7.5)
    kept = {
        name: (
            each.memory.residuals,
            each.memory.wgrad_residuals,
            each.memory.workspace,
        )
        for name, each in found.items()
    }
    # Five slots, two of wgrad residuals; the recomputed values return for one stage.
    assert kept == {"none": (40, 2, 0), "full": (10, 8, 6), "some": (25, 4, 9)}
    busy = StageMemory(8, 1, 0, 0, workspace=1, pair_workspace=7)
    ranking = rank_schedules(4, 8, costs, busy, limit=1, remat=full)
    works = {(c.schedule, c.remat): c.memory.workspace for c in ranking.candidates}
    assert works["1f1b", "none"] == 1 and works["1f1b", "full"] == 6
    assert works["dualpipe", "full"] == 7
    # Recomputing half a stage brings back no more than its own values.
    slim = StageMemory(8, 1, 0, 0)
    ranking = rank_schedules(
        4, 8, costs, slim, limit=1, remat=full, schedules="dualpipev"
    )
    assert {c.memory.workspace for c in ranking.candidates} == {0, 3}
