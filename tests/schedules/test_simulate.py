"""The simulator: published formulas, an independent clock, and bad costs."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dualpipe_jax.schedules.generators.dualpipe import dualpipe
from dualpipe_jax.schedules.generators.dualpipev import dualpipev
from dualpipe_jax.schedules.generators.gpipe import gpipe
from dualpipe_jax.schedules.generators.interleaved_1f1b import interleaved_1f1b
from dualpipe_jax.schedules.generators.interleaved_zero_bubble import (
    interleaved_zero_bubble,
)
from dualpipe_jax.schedules.generators.looped_bfs import looped_bfs
from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
from dualpipe_jax.schedules.generators.v_half import v_half
from dualpipe_jax.schedules.generators.v_min import v_min
from dualpipe_jax.schedules.generators.zb1p import zb1p
from dualpipe_jax.schedules.generators.zbv import zbv
from dualpipe_jax.schedules.schedule import Schedule, Task
from dualpipe_jax.schedules.simulator import Costs, Timeline, peak_activations, simulate

INTERLEAVED = (interleaved_1f1b, interleaved_zero_bubble, looped_bfs)
V_SHAPED = (dualpipev, zbv, v_half, v_min)
KINDS = (dualpipe, *V_SHAPED, one_f_one_b, zb1p, gpipe, *INTERLEAVED)


def tick_by_tick(schedule, costs):
    """Oracle: a clock that goes up by one, integer costs, every rank polled.

    Returns for each rank the start times of its steps.
    """
    end_of = {}  # task -> (time, rank)

    def arrived(task, rank, now):
        op, stage, m = task
        if op == "F":
            needs = [("F", stage - 1)] if stage else []
        elif op == "W":
            needs = [("I", stage)]
        else:
            needs = [("F", stage), ("BI", stage + 1)]
        for ops, at in needs:
            if at == schedule.num_stages:
                continue
            found = [end_of[t] for o in ops if (t := Task(o, at, m)) in end_of]
            if not found:
                return False
            end, producer = found[0]
            if end + (producer != rank) * costs.p2p > now:
                return False
        return True

    position, free = [0] * schedule.num_ranks, [0] * schedule.num_ranks
    starts = [[] for _ in range(schedule.num_ranks)]
    now = 0
    while any(len(s) < len(r) for s, r in zip(starts, schedule.steps, strict=True)):
        progress = True
        while progress:  # several steps at one time, when a cost is zero
            progress = False
            for rank, steps in enumerate(schedule.steps):
                if position[rank] == len(steps) or free[rank] > now:
                    continue
                step = steps[position[rank]]
                if not all(arrived(task, rank, now) for task in step):
                    continue
                free[rank] = now + getattr(
                    costs, step[0].op if len(step) == 1 else "FB"
                )
                end_of.update((task, (free[rank], rank)) for task in step)
                starts[rank].append(now)
                position[rank] += 1
                progress = True
        now += 1
    return starts


@st.composite
def cases(draw):
    make = draw(st.sampled_from(KINDS))
    num_ranks = draw(st.integers(1, 3)) * (2 if make is dualpipe else 1)
    steps = num_ranks if make in INTERLEAVED else 2
    num_microbatches = 2 * num_ranks + steps * draw(st.integers(0, 3))
    whole = st.integers(0, 5).map(float)
    costs = Costs(*(draw(whole) for _ in range(6)))
    return make(num_ranks, num_microbatches), costs


@given(cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_against_a_ticking_clock(case):
    schedule, costs = case
    timeline = simulate(schedule, costs)
    assert [[start for _, start, _ in rank] for rank in timeline.spans] == tick_by_tick(
        schedule, costs
    )
    for rank, steps in enumerate(schedule.steps):
        assert tuple(step for step, _, _ in timeline.spans[rank]) == steps
    for spans in timeline.spans:
        assert all(end - start == costs.of(step) for step, start, end in spans)


@pytest.mark.parametrize("num_ranks", range(2, 17, 2))
@pytest.mark.parametrize("extra", [0, 2, 4, 18])
def test_dualpipe_bubble_is_the_published_one(num_ranks, extra):
    """(PP/2-1)(F&B + B - 3W) at F=I=W=1, B=2, F&B=3, exactly, on every rank."""
    costs = Costs(F=1, I=1, W=1, B=2, FB=3)
    expected = (num_ranks / 2 - 1) * (costs.FB + costs.B - 3 * costs.W)
    num_microbatches = 2 * num_ranks + extra
    timeline = simulate(dualpipe(num_ranks, num_microbatches), costs)
    assert timeline.bubble == (expected,) * num_ranks
    assert timeline.makespan == 3 * num_microbatches + expected
    assert timeline.peak_activations == (num_ranks + 1,) * num_ranks
    # DualPipeV is one half of a DualPipe twice as deep: PP counts its stages.
    half = simulate(dualpipev(num_ranks // 2, num_microbatches // 2), costs)
    assert half.bubble == (expected,) * (num_ranks // 2)
    assert half.peak_activations == (num_ranks + 1,) * (num_ranks // 2)


def test_readme_example():
    """P=8, M=20, the figure of the DualPipe README: makespan 66, bubble 6."""
    timeline = simulate(dualpipe(8, 20), Costs(F=1, I=1, W=1, B=2, FB=3))
    assert timeline.makespan == 66
    assert timeline.bubble == (6.0,) * 8
    assert timeline.bubble_ratio == pytest.approx(6 / 66, rel=1e-15)
    assert timeline.peak_activations == (9,) * 8


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("make", [one_f_one_b, gpipe])
def test_1f1b_and_gpipe_bubble(make, num_ranks, num_microbatches):
    """(PP-1)(F+B) for any F and B; 1F1B holds min(PP - rank, M), GPipe all M."""
    costs = Costs(F=3, B=5)
    timeline = simulate(make(num_ranks, num_microbatches), costs)
    assert timeline.bubble == ((num_ranks - 1) * 8.0,) * num_ranks
    assert timeline.peak_activations == tuple(
        num_microbatches if make is gpipe else min(num_ranks - rank, num_microbatches)
        for rank in range(num_ranks)
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("extra", [0, 1, 16])
def test_zb1p_bubble(num_ranks, extra):
    """(PP-1)(F+B-2W) at F=I=W, with no more activations than 1F1B's first rank."""
    costs = Costs(F=2, I=2, W=2)
    num_microbatches = num_ranks + extra
    timeline = simulate(zb1p(num_ranks, num_microbatches), costs)
    assert timeline.bubble == ((num_ranks - 1) * 2.0,) * num_ranks
    assert timeline.peak_activations == (num_ranks,) * num_ranks


def test_p2p_counts_between_ranks_only():
    schedule = Schedule.from_csv("0F0,0B0\n1F0,2F0,2B0,1B0")
    timeline = simulate(schedule, Costs(F=1, B=2, p2p=0.5))
    assert timeline.spans[1][0][1:] == (1.5, 2.5)  # from rank 0
    assert timeline.spans[1][1][1:] == (2.5, 3.5)  # from rank 1 itself
    assert timeline.spans[0][1][1:] == (8.0, 10.0)
    assert timeline.makespan == 10.0


def test_nothing_takes_time():
    timeline = simulate(one_f_one_b(2, 2), Costs(F=0, I=0, W=0))
    assert timeline.makespan == timeline.bubble_ratio == 0.0


@pytest.mark.parametrize("make", KINDS)
def test_forward_only_keeps_nothing(make):
    timeline = simulate(make(4, 8).forward_only())
    assert timeline.peak_activations == (0, 0, 0, 0)
    assert math.isclose(sum(timeline.busy), 8 * timeline.schedule.num_stages)


def test_peak_counts_both_halves_of_a_pair():
    a, b = Task("F", 0, 0), Task("F", 0, 1)
    pair = (b, Task("B", 0, 0))
    assert peak_activations([(a,), pair, (Task("B", 0, 1),)]) == 2


def test_linear_time():
    """16 ranks, 512 microbatches: more than 16384 tasks, validated and simulated."""
    start = time.process_time()
    timeline = simulate(dualpipe(16, 512))
    assert timeline.bubble == (14.0,) * 16
    assert time.process_time() - start < 2.0


def test_costs_defaults_and_types():
    costs = Costs(F=np.float32(2), I=3, W=4)
    assert (costs.B, costs.FB, costs.p2p) == (7.0, 9.0, 0.0)
    assert Costs(B=1).FB == 2.0
    assert all(type(v) is float for v in vars(costs).values())
    assert simulate(gpipe(1, 1), costs) == simulate(gpipe(1, 1), Costs(2, 3, 4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"F": -1}, r"F=-1 must be a finite number >= 0"),
        ({"W": math.nan}, r"W=nan must be a finite number"),
        ({"FB": math.inf}, r"FB=inf must be a finite number"),
        ({"p2p": "3"}, r"p2p='3' must be a finite number"),
        ({"I": None}, r"I=None must be a finite number"),
    ],
)
def test_bad_costs(wrong, message):
    with pytest.raises(ValueError, match=message):
        Costs(**wrong)


def test_cannot_simulate_anything_else():
    with pytest.raises(TypeError, match=r"Cannot simulate str; pass a Schedule, or"):
        simulate("dualpipe")


def test_repr_is_one_line():
    timeline = simulate(zb1p(4, 8))
    text = "Timeline(zb1p, 4 ranks, 8 microbatches: makespan 27, bubble 11.1 %)"
    assert repr(timeline) == str(timeline) == text
    assert isinstance(timeline, Timeline)
