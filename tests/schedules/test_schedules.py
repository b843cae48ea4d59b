"""The generators: upstream's order, and what every schedule must keep."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dualpipe_jax.lowering.program import lower
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
from dualpipe_jax.schedules.schedule import OPS, Schedule, Task, predecessors, result_of
from dualpipe_jax.schedules.simulator import simulate

# [rank][step][task] = [op, direction, index within direction], recorded by running
# deepseek-ai/DualPipe@3da1bbe with compute and communication stubbed.
UPSTREAM = json.loads(
    (Path(__file__).parents[1] / "data" / "dualpipe_orders.json").read_text()
)
INTERLEAVED = (interleaved_1f1b, interleaved_zero_bubble, looped_bfs)
V_SHAPED = (dualpipev, zbv, v_half, v_min)
KINDS = (dualpipe, *V_SHAPED, one_f_one_b, zb1p, gpipe, *INTERLEAVED)


@st.composite
def schedules(draw):
    """A schedule of any kind and any legal size up to 16 ranks."""
    make = draw(st.sampled_from(KINDS))
    if make is dualpipe:
        num_ranks = 2 * draw(st.integers(1, 8))
        num_microbatches = 2 * (num_ranks + draw(st.integers(0, 12)))
    elif make is dualpipev:
        num_ranks = draw(st.integers(1, 12))
        num_microbatches = 2 * num_ranks + draw(st.integers(0, 12))
    elif make in INTERLEAVED:
        num_ranks, rounds = draw(st.integers(1, 8)), draw(st.integers(1, 4))
        # One round may be small; several have at least P microbatches each.
        least = num_ranks if rounds > 1 else 1
        size = least + draw(st.integers(0, (num_ranks - 1) // rounds))
        per_rank = draw(st.integers(1, 4))
        return make(num_ranks, rounds * size, stages_per_rank=per_rank)
    else:
        num_ranks, num_microbatches = draw(st.integers(1, 16)), draw(st.integers(1, 40))
    return make(num_ranks, num_microbatches)


@pytest.mark.parametrize("key", sorted(UPSTREAM))
def test_order_is_upstreams(key):
    kind, num_ranks, num_microbatches = key.split("/")
    num_ranks, num_microbatches = int(num_ranks), int(num_microbatches)
    schedule = {"dualpipe": dualpipe, "dualpipev": dualpipev}[kind](
        num_ranks, num_microbatches
    )

    def task(rank, op, direction, index):
        if kind == "dualpipe":
            stage = rank if direction == 0 else num_ranks - 1 - rank
            return Task(op, stage, index + direction * num_microbatches // 2)
        return Task(op, rank if direction == 0 else 2 * num_ranks - 1 - rank, index)

    assert schedule.steps == tuple(
        tuple(tuple(task(rank, *entry) for entry in step) for step in steps)
        for rank, steps in enumerate(UPSTREAM[key])
    )
    for rank, steps in enumerate(UPSTREAM[key]):
        for ours, theirs in zip(schedule.steps[rank], steps, strict=True):
            for mine, (_, direction, _) in zip(ours, theirs, strict=True):
                assert direction == schedule.direction_of(mine.stage, mine.microbatch)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("extra", [0, 1, 6])
def test_dualpipev_is_one_half_of_dualpipe(num_ranks, extra):
    """Rank r does what rank r of DualPipe on twice the ranks does ("cut in half")."""
    num_microbatches = 2 * num_ranks + extra
    half = dualpipev(num_ranks, num_microbatches)
    whole = dualpipe(2 * num_ranks, 2 * num_microbatches)
    for mine, theirs in zip(half.steps, whole.steps, strict=False):
        assert mine == tuple(
            tuple(t._replace(microbatch=t.microbatch % num_microbatches) for t in step)
            for step in theirs
        )


@given(schedules())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_task_once_and_after_what_it_needs(schedule):
    done = set()
    for rank, position in schedule.dependency_order:
        step = schedule.steps[rank][position]
        for task in step:
            assert set(predecessors(task, schedule)) <= done
        for task in step:
            assert result_of(task) not in done
            done.add(result_of(task))
        assert len(step) == 1 or [task.op for task in step] == ["F", "B"]
    cells = [
        (stage, microbatch)
        for stage in range(schedule.num_stages)
        for microbatch in range(schedule.num_microbatches)
    ]
    assert {task[1:] for task in done if task.op == "F"} == set(cells)
    assert {task[1:] for task in done if task.op == "I"} == set(cells)
    full = {task[1:] for _, _, step in schedule for task in step if task.op == "B"}
    assert {task[1:] for task in done if task.op == "W"} == set(cells) - full


@given(schedules())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_csv_round_trip_and_forward_only(schedule):
    again = Schedule.from_csv(schedule.to_csv(), kind=schedule.kind)
    assert again == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    forward = schedule.forward_only()
    assert forward.is_forward_only and not schedule.is_forward_only
    tasks = [task for _, _, step in forward for task in step]
    assert len(tasks) == schedule.num_stages * schedule.num_microbatches
    assert {task.op for task in tasks} == {"F"}


@pytest.mark.parametrize("make", KINDS)
def test_stages_stay_where_they_belong(make):
    schedule = make(4, 10)
    for stage in range(schedule.num_stages):
        for m in range(10):
            rank, direction = schedule.rank_of(stage, m), 0
            if make is dualpipe and m >= 5:
                expected, direction = 3 - stage, 1
            elif make in V_SHAPED and stage >= 4:
                expected, direction = 7 - stage, 1
            elif make in INTERLEAVED:
                expected, direction = stage % 4, stage // 4
            else:
                expected = stage
            assert rank == expected
            assert schedule.direction_of(stage, m) == direction


@pytest.mark.parametrize(
    ("route", "directions"),
    [
        ([0], [0]),
        ([0, 0], [0, 1]),
        ([0, 1, 0, 1], [0, 0, 1, 1]),
        ([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]),
        ([2, 1, 0], [1, 1, 1]),
        ([0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_direction_turns_and_wraps(route, directions):
    rows = [[] for _ in range(max(route) + 1)]
    for stage, rank in enumerate(route):
        rows[rank].append(f"{stage}F0")
    schedule = Schedule.from_csv("\n".join(",".join(row) for row in rows))
    assert [schedule.direction_of(s, 0) for s in range(len(route))] == directions


def test_csv_as_torch_writes_it():
    """csv.writer ends rows with CRLF, leaves idle cells empty and may quote."""
    text = '0F0,0F1,,"0B0",0I1,0W1\r\n,1F0,1B0,1F1,1I1,1W1\r\n\r\n'
    schedule = Schedule.from_csv(text)
    assert schedule.to_csv() == "0F0,0F1,0B0,0I1,0W1\n1F0,1B0,1F1,1I1,1W1\n"


def test_csv_with_communication_as_torch_writes_it():
    """Format "compute_comms" of `ScheduleInterleavedZeroBubble`, P = M = 2, FSDP."""
    text = """\
0UNSHARD,2UNSHARD,0F0,0SEND_F0,2RECV_F0,0F1,0SEND_F1,2RECV_F1,2F0,2SEND_F0,2F1,\
2SEND_F1,2RECV_B0,2B0,2SEND_B0,2RECV_B1,2B1,2SEND_B1,2REDUCE_GRAD,0RECV_B0,2RESHARD,\
0B0,0RECV_B1,0B1,0REDUCE_GRAD,0RESHARD
1UNSHARD,3UNSHARD,1RECV_F0,1F0,1SEND_F0,1RECV_F1,1F1,1SEND_F1,3RECV_F0,3F0,3RECV_F1,\
3I0,3SEND_B0,1RECV_B0,3F1,3I1,3SEND_B1,1RECV_B1,3W0,1I0,1SEND_B0,3W1,3REDUCE_GRAD,\
3RESHARD,1I1,1SEND_B1,1W0,1W1,1REDUCE_GRAD,1RESHARD
"""
    ours = interleaved_zero_bubble(2, 2)
    # Torch writes an I that its W follows at once as B.
    merged = ours.to_csv().splitlines()[0]
    for cell in ("2I0,2W0", "2I1,2W1", "0I0,0W0", "0I1,0W1"):
        merged = merged.replace(cell, cell[:4].replace("I", "B").rstrip(","))
    expected = merged + "\n" + ours.to_csv().splitlines()[1] + "\n"
    assert Schedule.from_csv(text).to_csv() == expected


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff0F0,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2\r\n",
        ' 0F0 ,\t0F1, "( 0F2 ; 0B0 ) OVERLAP_F_B",0B1 , 0B2 ,\n \n',
    ],
)
def test_csv_may_have_a_byte_order_mark_and_spaces(text):
    expected = "0F0,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2\n"
    assert Schedule.from_csv(text).to_csv() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-3], r"is not JSON \(.*pass what to_json writes"),
        (lambda text: "[" * 10**6, r"is not JSON \("),
        (
            lambda text: '{"traceEvents": []}',
            r"this one has traceEvents; write one with",
        ),
        (lambda text: "3", r"has the fields kind, num_ranks, .*this one has none"),
        (lambda text: text.replace('"mine"', "null"), r"kind must be a string, and"),
        (lambda text: text.replace('"0B0"', "0"), r'a list of cells such as "0F3" per'),
        (
            lambda text: text.replace("0B0", "0X0"),
            r"cell='0X0' of rank 0 is not a step",
        ),
        (
            lambda text: text.replace("1,", "1.5,", 1),
            r"num_ranks=1.5 must be an integer",
        ),
        (
            lambda text: text.replace("1,", "2,", 1),
            r"steps has 1 rows, but num_ranks=2",
        ),
    ],
)
def test_bad_json(change, message):
    text = Schedule.from_csv("0F0,0B0", kind="mine").to_json()
    with pytest.raises(ValueError, match=message):
        Schedule.from_json(change(text))
    assert Schedule.from_json("\ufeff" + text).to_json() == text


@pytest.mark.parametrize("make", KINDS)
def test_sizes_may_be_numpy_integers(make):
    schedule = make(np.int64(2), np.int32(4))
    assert schedule == make(2, 4)
    assert type(schedule.num_ranks) is type(schedule.steps[0][0][0].stage) is int


def test_repr_is_one_line():
    text = "Schedule('zb1p', num_ranks=4, num_stages=4, num_microbatches=9)"
    assert repr(zb1p(4, 9)) == str(zb1p(4, 9)) == text


@pytest.mark.parametrize("make", [one_f_one_b, zb1p, gpipe])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
def test_fewer_microbatches_than_ranks(make, num_microbatches):
    schedule = make(8, num_microbatches)
    assert {len(steps) for steps in schedule.steps} == {
        num_microbatches * (3 if make is zb1p else 2)
    }


@pytest.mark.parametrize(
    ("make", "num_ranks", "num_microbatches", "message"),
    [
        (dualpipe, 3, 8, r"num_ranks=3 must be even.*use an even number, or dualpipev"),
        (
            dualpipe,
            4,
            9,
            r"num_microbatches=9 must be even and >= 2\*num_ranks=4; .*10",
        ),
        (
            dualpipe,
            4,
            6,
            r"num_microbatches=6 must be even and >= 2\*num_ranks=4; .* 8",
        ),
        (dualpipe, 4, 5, r"num_microbatches=5 .*use 8 or more"),
        (dualpipe, 0, 8, r"num_ranks=0 must be at least 1"),
        (dualpipev, 3, 5, r"num_microbatches=5 must be >= 2\*num_ranks=3; use 6"),
        (dualpipev, 0, 5, r"num_ranks=0 must be at least 1"),
        (one_f_one_b, 2, 0, r"num_microbatches=0 must be at least 1"),
        (one_f_one_b, 2.0, 4, r"num_ranks=2.0 must be an integer"),
        (zb1p, -1, 4, r"num_ranks=-1 must be at least 1"),
        (gpipe, "2", 4, r"num_ranks='2' must be an integer"),
    ],
)
def test_illegal_sizes(make, num_ranks, num_microbatches, message):
    with pytest.raises(ValueError, match=message):
        make(num_ranks, num_microbatches)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"holds no task; write one row per rank"),
        (" ,,\n", r"holds no task"),
        ("0F0,0X0", r"cell='0X0' of rank 0 is not a step; write cells such as 0F3"),
        ("0F0,0SEND_X0,0B0", r"'0SEND_X0' of rank 0 is not a step"),
        ("0F0,0SEND_F,0B0", r"'0SEND_F' of rank 0 is not a step"),
        ("0F0,(0SEND_F0;0B0)OVERLAP_F_B", r"0B0\)OVERLAP_F_B' of rank 0 is not a step"),
        ("0UNSHARD,0RESHARD", r"holds no task"),
        ("0F0,0B0\n0RECV_F0,0SEND_F0", r"Rank 1 has no step; leave out ranks without"),
        ("0F0,0B0\n\n1F0,1B0", r"Rank 1 has no step; leave out ranks without work"),
        ("0F0,0B0,0F0", r"0F0 appears twice; run each task exactly once"),
        ("0F0,0B0,1B0", r"Stage 1, microbatch 0 has no F; add 1F0"),
        ("0F0,0F1,0B0", r"Stage 0, microbatch 1 must have either one B, or .*has none"),
        ("0F0,0I0", r"must have either one B, or one I and one W; has I\."),
        ("0F0,0W0", r"has W\."),
        ("0F0,0B0,0W0", r"has B, W\."),
        ("0F0,0B0,0I0,0W0", r"has B, I, W\."),
        ("0F0,0I0,0W0,0B0", r"has B, I, W\."),
        ("0B0,0F0", r"runs backward before its F; move F earlier"),
        ("0F0,0W0,0I0", r"runs W before its I; move I earlier"),
        ("0F0,0B0,1F1\n1F0,1B0,0F1,0B1,1B1", r"1B1 runs on rank 1, but rank 0 holds"),
        ("0F0,(0F1;0F2)OVERLAP_F_B", r"neither one task nor an overlapped pair"),
        ("0F0,(0F1;0I0)OVERLAP_F_B,0B1", r"neither one task nor an overlapped pair"),
        ("(0F0;0B0)OVERLAP_F_B", r"overlaps a microbatch with itself"),
        (
            "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0",
            r"deadlocks: rank \d at (0B0|1F1) waits for the (back|for)ward of stage",
        ),
    ],
)
def test_bad_csv(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_csv(text)


def test_bad_tables():
    good = one_f_one_b(2, 2)
    with pytest.raises(
        ValueError, match=r"steps has 1 rows, but num_ranks=2; give one"
    ):
        Schedule("mine", 2, 2, 2, good.steps[:1])
    with pytest.raises(ValueError, match=r"num_stages=0 must be at least 1"):
        Schedule("mine", 2, 0, 2, good.steps)
    with pytest.raises(ValueError, match=r"is unknown: .* microbatch below 1"):
        Schedule("mine", 2, 2, 1, good.steps)
    with pytest.raises(ValueError, match=r"op must be one of \('F', 'B', 'I', 'W'\)"):
        Schedule("mine", 1, 1, 1, (((Task("X", 0, 0),),),))
    assert OPS == ("F", "B", "I", "W")


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_whole_backwards_are_the_same_work_with_nothing_waiting(make, num_ranks):
    schedule = make(num_ranks, 4 * num_ranks)
    whole = schedule.with_whole_backwards()

    def tasks(schedule):
        return [task for _, _, step in schedule for task in step]

    assert {task.op for task in tasks(whole)} == {"F", "B"}
    for op in ("F", "B"):
        ours = sorted(task[1:] for task in tasks(whole) if task.op == op)
        replaced = ("B", "I") if op == "B" else ("F",)
        theirs = sorted(task[1:] for task in tasks(schedule) if task.op in replaced)
        assert ours == theirs
    for before, after in zip(schedule.steps, whole.steps, strict=True):
        # Pairs stay pairs, and what is no W stays in its place.
        assert [len(step) for step in before if step[0].op != "W"] == list(
            map(len, after)
        )
    assert lower(whole).num_wgrad_residual_slots == 0


@pytest.mark.parametrize("max_waiting", [0, 1, 2, 99])
@pytest.mark.parametrize("make", [dualpipe, zb1p, zbv])
def test_no_more_backwards_wait_than_allowed(make, max_waiting):
    schedule = make(4, 16)
    found = schedule.with_whole_backwards(max_waiting=max_waiting)
    slots = lower(schedule).num_wgrad_residual_slots
    assert lower(found).num_wgrad_residual_slots == min(max_waiting, slots)
    if max_waiting >= slots:
        assert found == schedule
    if make is dualpipe:  # others may lose more to the order than W fills
        whole = schedule.with_whole_backwards()
        times = [simulate(each).makespan for each in (schedule, found, whole)]
        assert times == sorted(times)
    with pytest.raises(ValueError, match=r"max_waiting=-1 must be at least 0"):
        schedule.with_whole_backwards(max_waiting=-1)
