"""The simulated order: exact times of small cases, invariants of random ones."""

import itertools
import math

import pytest
from hypothesis import given, strategies as st

from dualpipe_jax.gpu.overlap.timeline import Compute, Done, Start, run
from dualpipe_jax.gpu.overlap.work import KernelWork


def gemm(seconds, name="gemm"):
    return Compute(name, KernelWork(seconds=seconds, gemms=1.0, kernels=1.0))


def test_nothing_takes_no_time():
    assert run([]).makespan == 0


def test_hidden_in_part():
    done = run([Start("a", 5.0, "nvlink"), gemm(3.0), Done("a"), gemm(1.0)])
    assert (done.makespan, done.exposed) == (6.0, {"a": 2.0})
    assert done.under["a"].seconds == 3.0


def test_one_queue_is_in_order_two_are_not():
    events = [
        Start("a", 4.0, "x"),
        Start("b", 4.0, "x"),
        gemm(6.0),
        Done("b"),
        Done("a"),
    ]
    done = run(events)
    # a runs 0-4, b 4-8: b is 2 late.
    assert (done.makespan, done.exposed) == (8.0, {"a": 0.0, "b": 2.0})
    events[1] = Start("b", 4.0, "y")
    assert run(events).exposed == {"a": 0.0, "b": 0.0}


def test_a_stall_is_charged_to_what_runs_meanwhile():
    """b waits for a: each is charged with its own time and no more."""
    events = [
        Start("a", 4.0, "x"),
        gemm(1.0),
        Start("b", 2.0, "x"),
        Done("b"),
        Done("a"),
    ]
    done = run(events)
    assert (done.makespan, done.exposed) == (6.0, {"a": 3.0, "b": 2.0})


def test_a_start_without_a_done_ends_with_the_computation():
    assert run([Start("a", 4.0, "x"), gemm(1.0)]).exposed == {"a": 3.0}


def test_a_done_without_its_start_waits_for_nothing():
    assert run([Done("a"), gemm(1.0)]).makespan == 1.0


@st.composite
def events(draw):
    """Compute, starts and dones in any order in which a start comes before its done."""
    seconds = st.floats(0, 10, allow_subnormal=False)
    made, started = [], []
    for number in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["compute", "start", "done"]))
        if kind == "done" and started:
            made.append(Done(started.pop(draw(st.integers(0, len(started) - 1)))))
        elif kind == "start":
            made.append(Start(str(number), draw(seconds), draw(st.sampled_from("xy"))))
            started.append(str(number))
        else:
            made.append(gemm(draw(seconds), f"gemm{number}"))
    return made + [Done(name) for name in started]


@given(events())
def test_invariants(made):
    done = run(made)
    close = {"rel_tol": 1e-9, "abs_tol": 1e-9}  # sums of floats in another order
    times = {event.name: event.seconds for event in made if isinstance(event, Start)}
    compute = sum(e.work.seconds for e in made if isinstance(e, Compute))
    stalled = sum(stall.end - stall.begin for stall in done.stalls)
    assert math.isclose(done.makespan, compute + stalled, **close)
    assert done.makespan >= compute - 1e-9
    assert done.makespan <= compute + sum(times.values()) + 1e-9
    assert done.exposed.keys() == times.keys()
    assert all(0 <= done.exposed[name] <= times[name] + 1e-9 for name in times)
    assert math.isclose(sum(done.exposed.values()), stalled, **close)
    for queue in ("", "x", "y"):
        spans = sorted((s.begin, s.end) for s in done.spans if s.queue == queue)
        for (_, end), (begin, _) in itertools.pairwise(spans):
            assert begin >= end - 1e-9  # a stream runs one thing at a time


@given(events(), st.floats(1, 3))
def test_slower_links_never_end_sooner(made, factor):
    slower = [
        Start(e.name, factor * e.seconds, e.queue) if isinstance(e, Start) else e
        for e in made
    ]
    assert run(slower).makespan >= run(made).makespan - 1e-9


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_done_right_after_the_start_hides_nothing(asynchronous):
    between = [gemm(1.0)] if asynchronous else []
    done = run([gemm(2.0), Start("a", 3.0, "x"), *between, Done("a"), gemm(5.0)])
    assert done.exposed == {"a": 2.0 if asynchronous else 3.0}
