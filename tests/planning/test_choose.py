"""Rankings of schedules, against closed formulas and bytes counted by hand."""

import json
import math
import random
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from dualpipe_jax import Costs, Remat, StageMemory, rank_schedules
from dualpipe_jax.commands import main as cli
from dualpipe_jax.pictures.bytes import format_bytes, parse_bytes

GIB = 2**30
ALL = ["1f1b", "dualpipe", "dualpipev", "gpipe", "zb1p"]
# Of DeepSeek's published trace: F and I alone have their all-to-alls exposed.
DEEPSEEK = Costs(F=97, I=104, W=35, FB=129, p2p=1.2)
NOTHING = StageMemory(0, 0, 0, 0)
# Sums of times are equal but for the order in which they are added.
EXACT = {"rel": 1e-12}
# Times that differ by less are ranked by memory.
SAME = 1 + 1e-8


def only(ranking):
    (candidate,) = ranking.candidates
    return candidate


def by_name(ranking):
    return {each.schedule: each for each in ranking.candidates}


def time_of(name, ranks, microbatches, costs, **kwargs):
    kwargs = {"limit": 1, "schedules": [name]} | kwargs
    return only(rank_schedules(ranks, microbatches, costs, NOTHING, **kwargs)).time


# What it costs, and what it keeps.


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


def test_once_a_step():
    costs = Costs()
    for name, moved in (("1f1b", 0), ("zb1p", 0), ("dualpipe", 1), ("dualpipev", 1)):
        plain = time_of(name, 4, 8, costs)
        extra = time_of(name, 4, 8, costs, update_time=5, exchange_time=100) - plain
        assert extra == pytest.approx(5 + 100 * moved), name


HELD = {
    # parameters, gradients, residuals, crossing, messages of P=4, M=8, in stages of P
    "1f1b": (1, 1, 4, 0, 2),
    "zb1p": (1, 1, 4, 4, 2),
    "gpipe": (1, 1, 8, 0, 9),
    "dualpipe": (3, 2, 5, 2, 3),  # its own as it lies, and two to run
    "dualpipev": (2, 1, 4.5, 2, 3),  # two halves to run, from other ranks
}


@pytest.mark.parametrize("name", HELD)
def test_memory_by_hand(name):
    memory = StageMemory(
        residuals=10,
        crossing=1000,
        parameters=2,
        gradients=5,
        optimizer=7,
        message=100,
        workspace=3,
        pair_workspace=4,
        other=11,
    )
    ranked = only(rank_schedules(4, 8, DEEPSEEK, memory, limit=1, schedules=[name]))
    params, grads, residuals, crossing, messages = HELD[name]
    expected = {
        "parameters": 2 * params,
        "gradients": 5 * grads,
        "optimizer": 7,
        "residuals": 10 * residuals,
        "crossing": 1000 * crossing,
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
    halves = ("residuals", "crossing", "messages")
    for name, bytes_of in vars(large.memory).items():
        share = 0.5 if name in halves else 1
        assert vars(small.memory)[name] == share * bytes_of, name


def test_recomputation_costs_time_and_spares_memory():
    memory = StageMemory(residuals=8, crossing=1, parameters=0, gradients=0)
    full = Remat("full", residuals=2, crossing=4)
    some = Remat(
        "some", residuals=5, crossing=2, cost=1, overlapped_cost=0.5, workspace=9
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
        name: (each.memory.residuals, each.memory.crossing, each.memory.workspace)
        for name, each in found.items()
    }
    # Five slots and two in the queue; what is recomputed comes back for one stage.
    assert kept == {"none": (40, 2, 0), "full": (10, 8, 6), "some": (25, 4, 9)}
    busy = StageMemory(8, 1, 0, 0, workspace=1, pair_workspace=7)
    ranking = rank_schedules(4, 8, costs, busy, limit=1, remat=full)
    works = {(c.schedule, c.remat): c.memory.workspace for c in ranking.candidates}
    assert works["1f1b", "none"] == 1 and works["1f1b", "full"] == 6
    assert works["dualpipe", "full"] == 7
    # Nor does the recomputation of half a stage bring back more than its own.
    slim = StageMemory(8, 1, 0, 0)
    ranking = rank_schedules(
        4, 8, costs, slim, limit=1, remat=full, schedules="dualpipev"
    )
    assert {c.memory.workspace for c in ranking.candidates} == {0, 3}


# Who wins.


def test_dualpipe_wins_where_it_hides_communication_and_fits():
    memory = StageMemory(
        residuals=2 * GIB, crossing=GIB, parameters=2 * GIB, gradients=4 * GIB
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
    memory = StageMemory(residuals=1, crossing=3, parameters=10, gradients=24)
    # 1F1B needs 34 + 8; ZB1P 24 more for its queue; both DualPipes their copies.
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
    memory = StageMemory(residuals=4, crossing=1, parameters=3, gradients=6)
    remat = Remat("full", residuals=0.5, crossing=1)
    ranking = rank_schedules(8, 48, costs, memory, limit=45, remat=remat)
    best = ranking.best
    assert (best.schedule, best.remat) == ("1f1b", "none")
    told = [line for line in ranking.reason.splitlines() if line.startswith("DualPipe")]
    assert any("remat full: takes" in line and "recomputes" in line for line in told)
    assert any("less time than the best, but needs" in line for line in told)
    free = rank_schedules(8, 48, costs, memory, limit=100, remat=remat)
    assert free.best.schedule == "dualpipe"


def test_zb1p_wins_where_there_is_nothing_to_hide():
    costs = Costs(F=1, I=1, W=1)
    memory = StageMemory(residuals=2, crossing=1, parameters=10, gradients=20)
    ranking = rank_schedules(8, 32, costs, memory, limit=60)
    assert [each.schedule for each in ranking.fitting] == ["zb1p", "1f1b"]
    assert ranking.best.time == 32 * 3 + 7
    assert any("hide nothing" in note for note in ranking.notes)
    # With all the memory in the world, DualPipe saves one of its P-1 units: P-2.
    assert rank_schedules(8, 32, costs, memory, limit=1e3).best.time == 32 * 3 + 6


def test_zb1p_wins_where_pairs_cost_more_than_their_halves():
    costs = Costs(F=1, I=1, W=1, FB=3.3)  # two chunks at once get in each other's way
    ranking = rank_schedules(8, 32, costs, NOTHING, limit=1)
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
        crossing=2 * 10 * activation,
        parameters=parameters,
        gradients=2 * parameters,
        message=activation,
        workspace=4 * activation,
    )
    full = Remat("full", 2 * activation, 2 * 12 * activation, workspace=16 * activation)
    # What waits for W on the host: 19 GB each way at 50 GB/s, where F takes some 0.6 s.
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
    dearer = next(each for each in ranking.fitting if each.schedule == "dualpipev")
    assert dearer.remat == "offloaded" and dearer.time > best.time
    would = next(
        c for c in ranking.candidates if c.schedule == "dualpipev" and c.remat == "full"
    )
    assert would.time < best.time  # DualPipeV is the faster one, if only it fitted
    assert "24 slots between I and W" in ranking.reason


def test_nothing_fits_and_what_lacks_least():
    memory = StageMemory(residuals=2, crossing=1, parameters=2, gradients=4)
    ranking = rank_schedules(8, 32, DEEPSEEK, memory, limit=4)
    assert ranking.best is None and ranking.fitting == ()
    assert ranking.reason.startswith(
        "Nothing fits into 4 B. The least is 1F1B, M=32: needs 22 B, 18 B more than "
        "the limit: 16 B for 8 activation slots and 4 B for accumulators of 1 stage."
    )
    needs = [each.memory.total for each in ranking.candidates]
    assert needs == sorted(needs)
    assert "best: none" in repr(ranking)


def test_what_needs_all_of_the_limit_fits():
    memory = StageMemory(residuals=2, crossing=1, parameters=2, gradients=4)
    exact = rank_schedules(8, 32, DEEPSEEK, memory, limit=22)
    assert exact.best.schedule == "1f1b" and exact.best.spare == 0
    assert rank_schedules(8, 32, DEEPSEEK, memory, limit=22 - 1e-9).best is None


def test_what_is_no_schedule_is_left_out_with_the_reason():
    ranking = rank_schedules(8, [12, 17, 32], DEEPSEEK, NOTHING, limit=1)
    left_out = {(name, size) for name, size, _ in ranking.left_out}
    assert left_out == {("dualpipe", 12), ("dualpipev", 12), ("dualpipe", 17)}
    assert "must be even and >= 2*num_ranks=8" in ranking.reason
    assert len(ranking.candidates) == 3 * 5 - 3
    none = rank_schedules(3, 7, DEEPSEEK, NOTHING, limit=1, schedules=["dualpipe"])
    assert (none.best, none.candidates) == (None, ())
    assert "No schedule can be built" in str(none) and "must be even" in str(none)
    assert "<table>" in none._repr_html_()


def test_equally_fast_ones_are_ranked_by_memory():
    memory = StageMemory(residuals=1, crossing=0, parameters=0, gradients=0)
    ranking = rank_schedules(
        4, 16, Costs(), memory, limit=99, schedules=["gpipe", "1f1b"]
    )
    assert [each.schedule for each in ranking.candidates] == ["1f1b", "gpipe"]
    assert "just as fast as the best, but needs 16 B" in ranking.reason


# What must hold whatever the numbers are.

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
    crossing=positive,
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
    remat = Remat("half", memory.residuals / 2, memory.crossing)
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
    remat = Remat("full", 0, memory.crossing, cost=0)
    more = rank_schedules(4, [8, 16], costs, memory, limit=limit, remat=remat)
    assert set(keys(few.candidates)) <= set(keys(more.candidates))
    if few.best:
        assert more.best.time <= few.best.time * SAME


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, r"limit=0 must be a finite number > 0; give a device's bytes"),
        ({"limit": math.inf}, r"limit=inf must be a finite number > 0"),
        ({"limit": "80"}, r"limit='80' must be a finite number > 0"),
        ({"num_ranks": 0}, r"num_ranks=0 must be at least 1"),
        ({"num_microbatches": 0}, r"num_microbatches=0 must be at least 1"),
        ({"num_microbatches": []}, r"num_microbatches=\[\] must be a number of micro"),
        ({"num_microbatches": "16"}, r"num_microbatches='16' must be a number of"),
        ({"num_microbatches": [8.5]}, r"num_microbatches=8.5 must be an integer"),
        ({"measured_at": 0}, r"measured_at=0 must be at least 1"),
        ({"costs": None}, r"costs=None must be a Costs"),
        ({"costs": {"F": 1}}, r"costs=\{'F': 1\} must be a Costs"),
        ({"costs": Costs(F=0)}, r"costs.F=0.0 must be a finite number > 0"),
        ({"memory": 3}, r"memory=3 must be a StageMemory"),
        ({"remat": ["full"]}, r"remat='full' must be a Remat"),
        ({"remat": 3}, r"remat=3 must be a Remat"),
        ({"remat": [Remat("a", 1, 1)] * 2}, r"remat has \['a'\] twice"),
        ({"schedules": ["1f1b", "zbv"]}, r"names 'zbv', which is unknown; use some"),
        ({"schedules": []}, r"schedules=\[\] names none"),
        ({"task_overhead": -1}, r"task_overhead=-1 must be a finite number >= 0"),
        ({"update_time": math.nan}, r"update_time=nan must be a finite"),
        ({"exchange_time": None}, r"exchange_time=None must be a finite"),
    ],
)
def test_bad_arguments_are_named_with_the_remedy(changes, message):
    arguments = {
        "num_ranks": 4,
        "num_microbatches": 8,
        "costs": Costs(),
        "memory": NOTHING,
        "limit": 1,
    }
    with pytest.raises(ValueError, match=message):
        rank_schedules(**(arguments | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: StageMemory(-1, 0, 0, 0),
            r"residuals=-1 must be a finite number >= 0",
        ),
        (lambda: StageMemory(0, None, 0, 0), r"crossing=None must be a finite number"),
        (lambda: StageMemory(0, 0, 0, 0, at_rest=-2), r"at_rest=-2 must be a finite"),
        (lambda: Remat("full", math.nan, 0), r"residuals=nan must be a finite number"),
        (lambda: Remat("full", 0, 0, cost=-1), r"cost=-1 must be .* unit of costs"),
        (lambda: Remat("none", 0, 0), r"name='none' must be a word other than 'none'"),
        (lambda: Remat("", 0, 0), r"name='' must be a word"),
        (lambda: Costs(F=-1), r"F=-1 must be a finite number"),
    ],
)
def test_bad_fields_are_named_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "text", ["", "GiB", "1.5.2", ".", "٣", "-3", "1 XB", "1,5", "nan", "4 i"]
)
def test_bytes_that_are_none(text):
    with pytest.raises(ValueError, match=r"is no number of bytes; write 1\.5GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "number", [0, 1, 1023, 2**10, 2**20, 3.5 * 2**30, 2**40, 2**55]
)
def test_bytes_are_written_as_they_are_read(number):
    assert parse_bytes(format_bytes(number).replace(",", "")) == number
    assert parse_bytes("2.5 kB") == 2500 and parse_bytes("1e3") == 1000


# How it shows itself.

OPTIONS = {
    "--ranks": "8",
    "--microbatches": "32,64",
    "--costs": "F=97,I=104,W=35,FB=129,p2p=1.2",
    "--activations": "residuals=2GiB,crossing=1GiB,message=56MiB",
    "--memory": "limit=40GiB,parameters=2GiB,gradients=4GiB",
    "--remat": "full:residuals=0.2GiB,crossing=2GiB,cost=40",
}


def choose(capsys, *more, **changes):
    changes = {f"--{name.replace('_', '-')}": text for name, text in changes.items()}
    pairs = (OPTIONS | changes).items()
    args = [word for pair in pairs if pair[1] is not None for word in pair]
    try:
        status = cli.main(["choose", *args, *more])
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def ranking_of_options():
    return rank_schedules(
        8,
        [32, 64],
        DEEPSEEK,
        StageMemory(2 * GIB, GIB, 2 * GIB, 4 * GIB, message=56 * 2**20),
        limit=40 * GIB,
        remat=Remat("full", 0.2 * GIB, 2 * GIB, cost=40),
    )


def test_the_command_prints_the_ranking(capsys):
    status, out, _ = choose(capsys)
    assert (status, out) == (0, f"{ranking_of_options()}\n")
    lines = out.splitlines()
    assert lines[0].split()[:5] == ["schedule", "M", "remat", "time", "speed"]
    assert "optim" not in lines[0] and "msgs" in lines[0]  # there is no optimizer
    assert lines[1].split()[:5] == ["1", "DualPipe", "64", "none", "4,962.6"]
    assert "memory a device in GiB, limit 40.0 GiB" in out
    assert "Note: task_overhead=0" in out
    assert max(map(len, lines)) <= 120
    words = " ".join(out.split())  # reasons are wrapped, and otherwise as they are
    assert " ".join(ranking_of_options().reason.split()) in words


def test_the_command_of_the_document_prints_its_table(capsys):
    text = (Path(__file__).parents[2] / "docs/choosing.md").read_text()
    (command,) = re.findall(r"^\$ python -m dualpipe_jax (choose .*)", text, re.M)
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out in text


def test_json_is_the_ranking(capsys):
    status, out, _ = choose(capsys, "--json")
    found, ranking = json.loads(out), ranking_of_options()
    assert status == 0
    assert found == json.loads(json.dumps(ranking.to_dict()))
    assert found["best"] == {
        "schedule": "dualpipe",
        "num_microbatches": 64,
        "remat": "none",
    }
    first = found["candidates"][0]
    assert first["memory"]["total"] == ranking.best.memory.total
    assert first["spare"] == found["limit"] - first["memory"]["total"]
    assert (first["num_slots"], first["num_weight_slots"]) == (9, 4)
    assert found["left_out"] == [] and len(found["notes"]) == 1


def test_the_status_says_that_nothing_fits(capsys):
    status, out, err = choose(capsys, memory="limit=1MB,parameters=2GiB,gradients=4GiB")
    assert (status, err) == (1, "")
    assert "Nothing fits into 976.6 KiB" in out


def test_all_options_reach_the_ranking(capsys):
    more = {
        "schedules": "1f1b,zb1p",
        "measured_at": "64",
        "task_overhead": "2",
        "update_time": "30",
        "exchange_time": "4",
        "activations": "residuals=2,crossing=1,workspace=5,pair_workspace=8",
        "memory": "limit=90,parameters=1,gradients=2,at_rest=3,optimizer=4,other=6",
        "remat": "r:residuals=1,crossing=1,cost=9,overlapped_cost=8,workspace=7",
    }
    _, out, _ = choose(capsys, "--json", **more)
    expected = rank_schedules(
        8,
        [32, 64],
        DEEPSEEK,
        StageMemory(
            2, 1, 1, 2, at_rest=3, optimizer=4, workspace=5, pair_workspace=8, other=6
        ),
        limit=90,
        remat=Remat("r", 1, 1, cost=9, overlapped_cost=8, workspace=7),
        schedules=["1f1b", "zb1p"],
        measured_at=64,
        task_overhead=2,
        update_time=30,
        exchange_time=4,
    )
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": None}, "required: --costs"),
        ({"memory": None}, "required: --memory"),
        ({"costs": "F=97,I=104"}, "--costs lacks W; give F, I and W"),
        ({"costs": "F=97,I=104,W=-3"}, "W=-3.0 must be a finite number >= 0"),
        ({"microbatches": "16;32"}, "--microbatches '16;32' must be such as 16 or"),
        ({"memory": "limit=80GiB"}, "lacks parameters, gradients; give bytes"),
        (
            {"memory": "limit=0,parameters=1,gradients=1"},
            "limit=0.0 must be a finite number > 0",
        ),
        ({"activations": "residuals=1GiB"}, "lacks crossing; give bytes"),
        ({"activations": "residuals=x"}, "'residuals=x': 'x' is no number of bytes"),
        ({"activations": "size=1"}, "'size' is unknown; give each of residuals"),
        ({"activations": "residuals=1,residuals=1"}, "'residuals' is given twice"),
        ({"remat": "residuals=1,crossing=2"}, "'' lacks residuals, crossing"),
        ({"remat": ":residuals=1,crossing=2"}, "name='' must be a word"),
        ({"remat": "f:residuals=1,crossing=2,cost=x"}, "'cost=x': could not convert"),
        ({"schedules": "zbv"}, "names 'zbv', which is unknown"),
    ],
)
def test_errors_are_one_line_and_exit_2(changes, message, capsys):
    status, out, err = choose(capsys, **changes)
    assert (status, out) == (2, "")
    assert err.startswith("python -m dualpipe_jax choose: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_notebooks_show_a_table_that_escapes_names():
    remat = Remat("<b>&", 0, 0)
    ranking = rank_schedules(2, 4, Costs(), NOTHING, limit=1, remat=remat)
    html = ranking._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;&amp;" in html
    assert html.count("<tr") == 1 + len(ranking.candidates) == 11
    assert html.count("<li>") == len(ranking.reason.splitlines())


def test_a_ranking_does_not_change():
    ranking = ranking_of_options()
    with pytest.raises(AttributeError):
        ranking.limit = 3
    with pytest.raises(AttributeError):
        ranking.best.time = 0
