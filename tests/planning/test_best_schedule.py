"""Which schedule is the best, in settings where that is known."""

import pytest

from dualpipe_jax import Costs, Remat, StageMemory, rank_schedules
from tests.planning.rankings import ALL, DEEPSEEK, GIB, NOTHING


def by_name(ranking):
    return {each.schedule: each for each in ranking.candidates}


def test_dualpipe_wins_where_it_hides_communication_and_fits():
    memory = StageMemory(
        residuals=2 * GIB, wgrad_residuals=GIB, parameters=2 * GIB, gradients=4 * GIB
    )
    ranking = rank_schedules(8, 64, DEEPSEEK, memory, limit=80 * GIB)
    names = [each.schedule for each in ranking.fitting]
    assert names[:2] == ["dualpipe", "dualpipev"]
    found = by_name(ranking)
    assert found["1f1b"].time / found["dualpipe"].time > 1.6
    assert "runs F and B one after the other (236, where a pair would take 129)" in (
        found["1f1b"].reason
    )
    assert "its pairs take 129 where F and B alone take 236" in ranking.reason
    assert not found["gpipe"].fits and "64 activation slots" in found["gpipe"].reason


def test_1f1b_wins_where_two_copies_do_not_fit():
    memory = StageMemory(residuals=1, wgrad_residuals=3, parameters=10, gradients=24)
    # 1F1B needs 34 + 8; ZB1P 24 more of wgrad residuals; both DualPipes their copies.
    ranking = rank_schedules(8, 32, DEEPSEEK, memory, limit=45)
    assert [each.schedule for each in ranking.fitting] == ["1f1b"]
    found = by_name(ranking)
    needs = 30 + 48 + 9 + 4 * 3
    assert found["dualpipe"].reason == (
        f"would take 38.5 % less time than the best, but needs {needs} B, "
        f"{needs - 45} B more than the limit: 48 B for accumulators of 2 stages (24 B "
        "in the best) and 30 B for parameters at rest and in use (10 B in the best)."
    )
    assert found["dualpipe"].time / ranking.best.time == pytest.approx(0.615, abs=5e-4)


def test_1f1b_wins_where_dualpipe_would_have_to_recompute():
    """What it hides is less than what recomputation costs."""
    costs = Costs(F=40, I=45, W=35, FB=105)  # little to hide
    memory = StageMemory(residuals=4, wgrad_residuals=1, parameters=3, gradients=6)
    remat = Remat("full", residuals=0.5, wgrad_residuals=1)
    ranking = rank_schedules(8, 48, costs, memory, limit=45, remat=remat, schedules=ALL)
    best = ranking.best
    assert (best.schedule, best.remat) == ("1f1b", "none")
    told = [line for line in ranking.reason.splitlines() if line.startswith("DualPipe")]
    assert any("remat full: takes" in line and "recomputes" in line for line in told)
    assert any("less time than the best, but needs" in line for line in told)
    free = rank_schedules(8, 48, costs, memory, limit=100, remat=remat, schedules=ALL)
    assert free.best.schedule == "dualpipe"


def test_zb1p_wins_where_there_is_nothing_to_hide():
    costs = Costs(F=1, I=1, W=1)
    memory = StageMemory(residuals=2, wgrad_residuals=1, parameters=10, gradients=20)
    ranking = rank_schedules(8, 32, costs, memory, limit=60, schedules=ALL)
    assert [each.schedule for each in ranking.fitting] == ["zb1p", "1f1b"]
    assert ranking.best.time == 32 * 3 + 7
    assert any("hide nothing" in note for note in ranking.notes)
    # With unlimited memory, DualPipe saves one of the P-1 units: P-2.
    rich = rank_schedules(8, 32, costs, memory, limit=1e3, schedules=ALL)
    assert rich.best.time == 32 * 3 + 6


def test_two_stages_a_rank_halve_the_bubble_and_are_copied():
    """Interleaved zero bubble: (P-1)(F+I-W) of half a stage; 10 B more for copies."""
    costs = Costs(F=1, I=1, W=1)
    memory = StageMemory(residuals=2, wgrad_residuals=1, parameters=10, gradients=20)
    ranking = rank_schedules(8, 32, costs, memory, limit=60)
    best = [each.schedule for each in ranking.fitting]
    assert best == ["interleaved_zero_bubble", "zb1p", "v_half", "v_min", "1f1b"]
    assert ranking.best.time == 32 * 3 + 7 / 2
    assert ranking.best.memory.parameters == 20


def test_v_half_wins_where_activations_are_what_takes_memory():
    """Activations take 10, where 1F1B's take 16; one more for copied parameters."""
    memory = StageMemory(residuals=2, wgrad_residuals=0.5, parameters=1, gradients=2)
    ranking = rank_schedules(8, 32, Costs(F=1, I=1, W=1), memory, limit=16)
    assert [each.schedule for each in ranking.fitting] == ["v_half", "v_min"]
    assert ranking.best.time == 32 * 3 + 17 / 2


def test_zb1p_wins_where_pairs_cost_more_than_their_halves():
    costs = Costs(F=1, I=1, W=1, FB=3.3)  # two chunks at once get in each other's way
    ranking = rank_schedules(8, 32, costs, NOTHING, limit=1, schedules=ALL)
    assert ranking.best.schedule == "zb1p"
    assert "FB=3.3 is no less than F + B = 3" in ranking.reason


def test_the_anchor_that_chose_1f1b():
    """A 535B model on 192 H100s (marin-community/marin#9277): 1F1B, not DualPipeV.

    PP24 x EP8, 48 microbatches, 65,536 tokens of width 6144 a device, 48 layers, so two
    a stage: 0.75 GiB for each activation. Estimated: full recomputation keeps the input
    of each layer; W needs inputs and cotangents of some ten products a layer. The
    optimizer's state is the host's there.
    """
    activation = 65536 * 6144 * 2
    parameters = 535.5e9 / 192 * 2
    memory = StageMemory(
        residuals=2 * 16 * activation,
        wgrad_residuals=2 * 10 * activation,
        parameters=parameters,
        gradients=2 * parameters,
        message=activation,
        workspace=4 * activation,
    )
    full = Remat("full", 2 * activation, 2 * 12 * activation, workspace=16 * activation)
    # wgrad residuals on the host: 19 GB each way at 50 GB/s, where F takes some 0.6 s.
    offloaded = Remat(
        "offloaded", 2 * activation, 0, cost=2 + 2.6, workspace=16 * activation
    )
    costs = Costs(F=2, I=2, W=2, FB=5.5)  # pairs hide some of it
    ranking = rank_schedules(
        24,
        48,
        costs,
        memory,
        limit=80e9,
        remat=[full, offloaded],
        schedules=["1f1b", "dualpipev"],
    )
    best = ranking.best
    assert (best.schedule, best.remat) == ("1f1b", "full")
    fits = {(each.schedule, each.remat) for each in ranking.fitting}
    assert ("dualpipev", "full") not in fits
    assert ("dualpipev", "none") not in fits
    slower = next(each for each in ranking.fitting if each.schedule == "dualpipev")
    assert slower.remat == "offloaded" and slower.time > best.time
    would = next(
        c for c in ranking.candidates if c.schedule == "dualpipev" and c.remat == "full"
    )
    assert would.time < best.time  # DualPipeV would be faster if it fitted
    assert "24 slots of wgrad residuals" in ranking.reason
