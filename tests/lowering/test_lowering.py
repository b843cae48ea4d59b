"""The lowered program moves the right values, and waits no more than needed."""

import functools
import hashlib
import itertools

import numpy as np
import pytest

from dualpipe_jax.lowering.program import Program, lower
from dualpipe_jax.lowering.slots import assign_slots
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
from dualpipe_jax.schedules.schedule import Schedule
from dualpipe_jax.schedules.simulator import Costs, simulate

# Times of one chunk in DeepSeek's published training trace, in milliseconds.
REAL = Costs(F=97, I=104, W=35, B=139, FB=129, p2p=1.2)
UNIT = Costs()

SIZES = [
    *((dualpipe, p, m) for p in (2, 4, 6, 8, 16) for m in (2 * p, 2 * p + 2, 4 * p)),
    *((dualpipev, p, m) for p in (1, 2, 3, 4, 5, 8) for m in (2 * p, 3 * p + 1)),
    *(
        (kind, p, m)
        for kind in (one_f_one_b, zb1p, gpipe)
        for p, m in ((1, 1), (1, 5), (4, 2), (4, 8), (5, 7), (8, 32))
    ),
]
SEVERAL_STAGES = [
    (kind, p, m)
    for kind in (
        zbv,
        v_half,
        v_min,
        interleaved_1f1b,
        interleaved_zero_bubble,
        looped_bfs,
        functools.partial(interleaved_1f1b, stages_per_rank=3),
    )
    for p, m in ((1, 3), (2, 4), (3, 3), (4, 2), (4, 8), (5, 10))
]
# Not yet interleaved 1F1B and zero bubble, which take up to a fifth longer.
CHEAP = [dualpipe, dualpipev, one_f_one_b, zb1p, gpipe, zbv, v_half, v_min, looped_bfs]
ALL = [*SIZES, *SEVERAL_STAGES]
IDS = [f"{getattr(kind, '__name__', 'three stages')}-{p}-{m}" for kind, p, m in ALL]


class Machine:
    """Runs a program's tables on names of values instead of arrays.

    It is based only on the meaning of the tables: a slot holds whatever was last
    written there, so a slot that is reused too early yields a wrong name.
    """

    def __init__(self, program: Program):
        self.program = program
        self.last = program.schedule.num_stages - 1
        ranks = range(program.schedule.num_ranks)
        self.messages = [{} for _ in ranks]
        self.saved = [{} for _ in ranks]
        self.wgrad = [{} for _ in ranks]
        self.done = []

    def run(self):
        for tick in range(self.program.num_ticks):
            for rank in range(self.program.schedule.num_ranks):
                self._step(tick, rank)
            self._permute(tick)
        return self.done

    def _permute(self, tick):
        table = self.program.table
        for k, pairs in enumerate(self.program.permutes[tick]):
            assert len({a for a, _ in pairs}) == len({b for _, b in pairs})
            sent = {
                b: self.messages[a].get(int(table.send[tick, a, k])) for a, b in pairs
            }
            for rank, held in enumerate(self.messages):
                slot = int(table.receive[tick, rank, k])
                assert (rank in sent) == (slot < self.program.num_message_slots)
                held[slot] = sent.get(rank)

    def _step(self, tick, rank):
        row = type(self.program.table)(
            *(field[tick, rank] for field in self.program.table)
        )
        if row.kind < 0:
            return
        chunks = self.program.chunks[rank]
        mail, saved, wgrad = self.messages[rank], self.saved[rank], self.wgrad[rank]
        kind = dict(self.program.kinds[row.kind])
        stages = {op: chunks[chunk] for op, chunk in kind.items()}
        f, b = int(row.f_microbatch), int(row.b_microbatch)
        if "F" in kind:
            assert row.f_first == (stages["F"] == 0)
            assert row.f_last == (stages["F"] == self.last)
            if row.f_first:
                mail[int(row.f_in)] = ("x", 0, f)
        # All reads of a step come before its writes.
        writes = []
        for op, stage in stages.items():
            if op == "F":
                assert mail[int(row.f_in)] == ("x", stage, f)
                writes.append((mail, row.f_out, ("x", stage + 1, f)))
                if not self.program.schedule.is_forward_only:
                    writes.append((saved, row.f_slot, ("res", stage, f)))
            elif op in "BI":
                assert mail[int(row.b_in)] == ("dy", stage, b)
                assert saved[int(row.b_slot)] == ("res", stage, b)
                assert row.b_first == (stage == 0)
                writes.append((mail, row.b_out, ("dy", stage - 1, b)))
                if op == "I":
                    writes.append((wgrad, row.wgrad_slot, ("cross", stage, b)))
            else:
                _, kept_stage, w = wgrad[int(row.wgrad_slot)]
                assert kept_stage == stage
                assert saved[int(row.b_slot)] == ("res", stage, w)
                assert b == w
            m = f if op == "F" else b
            self.done.append((op, stage, m))
        for pool, slot, value in writes:
            pool[int(slot)] = value
        if "F" in kind and row.f_last:
            assert mail[int(row.f_out)] == ("x", self.last + 1, f)
            if not self.program.schedule.is_forward_only:
                mail[int(row.loss_out)] = ("dy", self.last, f)
        if row.b_first:
            assert mail[int(row.b_out)] == ("dy", -1, b)


def tasks_of(schedule):
    return sorted(tuple(task) for _, _, step in schedule for task in step)


@pytest.mark.parametrize(("kind", "ranks", "microbatches"), ALL, ids=IDS)
def test_program_computes_the_schedule(kind, ranks, microbatches):
    schedule = kind(ranks, microbatches)
    assert sorted(Machine(lower(schedule)).run()) == tasks_of(schedule)


@pytest.mark.parametrize(("kind", "ranks", "microbatches"), ALL, ids=IDS)
def test_forward_only_program_computes_the_schedule(kind, ranks, microbatches):
    schedule = kind(ranks, microbatches).forward_only()
    program = lower(schedule)
    assert sorted(Machine(program).run()) == tasks_of(schedule)
    assert program.num_slots == program.num_wgrad_residual_slots == 0


@pytest.mark.parametrize(("kind", "ranks", "microbatches"), ALL, ids=IDS)
def test_slots_are_the_peak_of_the_schedule(kind, ranks, microbatches):
    schedule = kind(ranks, microbatches)
    assert lower(schedule).num_slots == max(simulate(schedule).peak_activations)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("factor", [2, 3, 5])
def test_dualpipe_buffers(ranks, factor):
    program = lower(dualpipe(ranks, factor * ranks))
    assert program.num_slots == ranks + 1
    assert program.num_wgrad_residual_slots == ranks // 2
    # An activation and a cotangent: messages are used in the tick after they arrive.
    assert program.num_message_slots == 2


@pytest.mark.parametrize("kind", CHEAP)
@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("factor", [2, 2.25, 4])
def test_permutes_cost_little(kind, ranks, factor):
    schedule = kind(ranks, int(factor * ranks) // 2 * 2)
    program = lower(schedule)
    for costs in (UNIT, REAL):
        ideal = simulate(schedule, costs).makespan
        assert simulate(program, costs).makespan <= 1.05 * ideal
    # At the costs that define the ticks, no permute makes a rank wait.
    assert simulate(program, UNIT).makespan == simulate(schedule, UNIT).makespan


def test_program_cannot_beat_the_ideal():
    schedule = dualpipe(8, 20)
    program = lower(schedule)
    rng = np.random.default_rng(0)
    for _ in range(20):
        f, i, w, p2p = rng.uniform(0.1, 2, 4)
        costs = Costs(F=f, I=i, W=w, p2p=p2p)
        assert simulate(program, costs).makespan >= simulate(schedule, costs).makespan


def test_p2p_delays_both_ends():
    schedule = Schedule.from_csv("0F0,0B0\n1F0,1B0")
    timeline = simulate(lower(schedule), Costs(F=2, I=1, W=1, p2p=0.5))
    ((_, start_f0, _), (_, start_b0, _)), ((_, start_f1, _), _) = timeline.spans
    assert (start_f0, start_f1) == (0, 2.5)
    assert start_b0 == 2.5 + 2 + 2 + 0.5


@pytest.mark.parametrize("kind", [dualpipe, dualpipev])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_steady_state_is_one_loop_that_grows_with_microbatches(kind, ranks):
    # Two ranks need two more microbatches before a pair follows a pair.
    least = max(2 * ranks, 6)
    (shortest,) = lower(kind(ranks, least)).loops
    ramps = lower(kind(ranks, least)).num_ticks - 2 * shortest.trips
    for microbatches in (least, least + 4, 4 * least):
        program = lower(kind(ranks, microbatches))
        (loop,) = program.loops
        assert loop.period == 2
        kinds = program.table.kind[loop.start : loop.stop]
        # Every rank runs the same kind of overlapped pair in every tick.
        assert (kinds == kinds[:, :1]).all()
        assert all(len(program.kinds[number]) == 2 for number in kinds[:, 0])
        # Activation and cotangent, to the same neighbour. Two ranks are both ends, and
        # exchange something only after every other tick.
        rounds = {len(program.permutes[t]) for t in range(loop.start, loop.stop)}
        assert rounds == ({0, 2} if ranks == 2 else {2})
        # The length of the ramps does not depend on the number of microbatches.
        assert program.num_ticks - 2 * loop.trips == ramps


def test_every_tick_of_a_loop_repeats():
    for kind, ranks, microbatches in SIZES:
        program = lower(kind(ranks, microbatches))
        for loop in program.loops:
            for tick in range(loop.start + loop.period, loop.stop):
                before = tick - loop.period
                assert program.permutes[tick] == program.permutes[before]
                assert (program.table.kind[tick] == program.table.kind[before]).all()


def test_programs_are_what_they_were():
    # What runs, and what compilation caches hold, follows from these tables: a change
    # of the digest must be on purpose.
    digest = hashlib.sha256()
    for kind, ranks, microbatches in SIZES:
        program = lower(kind(ranks, microbatches))
        for table in (program.ticks, *program.table):
            assert table.dtype == np.int32
            digest.update(table.tobytes())
        digest.update(repr((program.permutes, program.kinds)).encode())
        digest.update(repr((program.chunks, program.loops)).encode())
    assert digest.hexdigest()[:16] == "eb646302a3d3d2ce"


def test_long_schedules_repeat_what_short_ones_do():
    short, long = lower(dualpipe(4, 40)), lower(dualpipe(4, 400))
    assert long.num_ticks - short.num_ticks == 360
    assert {loop.period for loop in long.loops} == {2}
    start = long.loops[0].start
    for name in ("kind", "f_in", "b_slot", "send", "receive"):
        table = getattr(long.table, name)[start:]
        np.testing.assert_array_equal(
            table[:20], getattr(short.table, name)[start : start + 20]
        )


def test_number_of_permute_patterns_does_not_grow():
    def patterns(microbatches):
        program = lower(dualpipe(8, microbatches))
        return set(itertools.chain.from_iterable(program.permutes))

    assert patterns(16) == patterns(64)


def test_unequal_ranks_are_refused():
    schedule = Schedule.from_csv("0F0,1F0,1B0,0B0\n2F0,2B0")
    with pytest.raises(ValueError, match=r"different numbers of stages .*\[2, 1\]"):
        lower(schedule)


def test_assign_slots_never_shares():
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 50, 200)
    ends, ranks = starts + rng.integers(0, 9, 200), rng.integers(0, 3, 200)
    slots, count = assign_slots(starts, ends, ranks)
    for a, b in itertools.combinations(range(200), 2):
        overlap = ranks[a] == ranks[b] and max(starts[[a, b]]) <= min(ends[[a, b]])
        assert not (overlap and slots[a] == slots[b])
    alive = max(
        ((starts <= t) & (t <= ends) & (ranks == r)).sum()
        for t in range(60)
        for r in range(3)
    )
    assert count == alive
