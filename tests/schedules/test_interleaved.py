"""Schedules with several stages a rank: torch's orders, and the papers' formulas."""

import json
from pathlib import Path

import pytest

from dualpipe_jax.schedules.generators.interleaved_1f1b import interleaved_1f1b
from dualpipe_jax.schedules.generators.interleaved_zero_bubble import (
    interleaved_zero_bubble,
)
from dualpipe_jax.schedules.generators.looped_bfs import looped_bfs
from dualpipe_jax.schedules.generators.zb1p import zb1p
from dualpipe_jax.schedules.generators.zbv import zbv
from dualpipe_jax.schedules.schedule import Schedule
from dualpipe_jax.schedules.simulator import Costs, simulate

# "SCHEDULE:P:M:v" -> a row of cells per rank, of torch.distributed.pipelining 2.14.
TORCH = json.loads(
    (Path(__file__).parents[1] / "data" / "torch_schedules.json").read_text()
)["orders"]
MAKE = {
    "Interleaved1F1B": interleaved_1f1b,
    "InterleavedZeroBubble": interleaved_zero_bubble,
    "LoopedBFS": looped_bfs,
    "ZBVZeroBubble": zbv,
}
INTERLEAVED = [interleaved_1f1b, interleaved_zero_bubble, looped_bfs]
SIZES = [
    (num_ranks, rounds * num_ranks, stages_per_rank)
    for num_ranks in (1, 2, 3, 4, 8)
    for rounds in (1, 2, 5)
    for stages_per_rank in (1, 2, 3, 4)
]


@pytest.mark.parametrize("key", sorted(TORCH))
def test_order_is_torchs(key):
    name, *sizes = key.split(":")
    num_ranks, num_microbatches, stages_per_rank = map(int, sizes)
    make = MAKE[name]
    chosen = {"stages_per_rank": stages_per_rank} if make in INTERLEAVED else {}
    ours = make(num_ranks, num_microbatches, **chosen)
    assert ours == Schedule.from_csv("\n".join(TORCH[key]), kind=ours.kind)


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "per_rank"), SIZES)
def test_interleaved_1f1b(num_ranks, num_microbatches, per_rank):
    """Bubble: arXiv:2104.04473, section 2.2.2; memory: arXiv:2205.05198, 4.2.3.

    (P-1)(F+B) / v of 1F1B's stages, and 1 + (P-1)/(Pv) times 1F1B's memory.
    """
    schedule = interleaved_1f1b(num_ranks, num_microbatches, stages_per_rank=per_rank)
    timeline = simulate(schedule, Costs(F=3, B=5))
    assert timeline.bubble == ((num_ranks - 1) * 8.0,) * num_ranks
    assert timeline.peak_activations == tuple(
        min(
            (per_rank + 1) * num_ranks - 1 - 2 * rank,
            num_microbatches * per_rank,
        )
        for rank in range(num_ranks)
    )


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "per_rank"), SIZES)
def test_looped_bfs(num_ranks, num_microbatches, per_rank):
    """arXiv:2211.05953, section 4: interleaved 1F1B's bubble, GPipe's memory."""
    schedule = looped_bfs(num_ranks, num_microbatches, stages_per_rank=per_rank)
    timeline = simulate(schedule, Costs(F=3, B=5))
    assert timeline.bubble == ((num_ranks - 1) * 8.0,) * num_ranks
    assert timeline.peak_activations == (num_microbatches * per_rank,) * num_ranks


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "per_rank"), SIZES)
def test_interleaved_zero_bubble(num_ranks, num_microbatches, per_rank):
    """ZB-H1's formulas (arXiv:2401.10241, section 2.1) with stages a v-th as large."""
    schedule = interleaved_zero_bubble(
        num_ranks, num_microbatches, stages_per_rank=per_rank
    )
    timeline = simulate(schedule, Costs(F=2, I=2, W=2))
    assert timeline.bubble == ((num_ranks - 1) * 2.0,) * num_ranks
    assert timeline.peak_activations == (num_ranks * per_rank,) * num_ranks
    if per_rank == 1:
        assert schedule.steps == zb1p(num_ranks, num_microbatches).steps


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("extra", [0, 1, 9])
def test_zbv(num_ranks, extra):
    """arXiv:2401.10241, section 6: at F=I=W no wait inside of a rank's work.

    1F1B's memory: activations of P stages, here 2P of half a stage.
    """
    num_microbatches = 2 * num_ranks - 1 + extra
    timeline = simulate(zbv(num_ranks, num_microbatches))
    for spans in timeline.spans:
        assert spans[-1][2] - spans[0][1] == 6 * num_microbatches
    assert timeline.makespan == 6 * num_microbatches + num_ranks - 1
    assert timeline.peak_activations == (2 * num_ranks,) * num_ranks


@pytest.mark.parametrize("num_microbatches", [1, 2, 6])
@pytest.mark.parametrize("make", MAKE.values())
def test_fewer_microbatches_than_fill_the_pipeline(make, num_microbatches):
    """A `Schedule` validates itself: every task is there, and nothing deadlocks."""
    schedule = make(8, num_microbatches)
    assert (schedule.num_stages, schedule.num_microbatches) == (16, num_microbatches)


@pytest.mark.parametrize("make", INTERLEAVED[:2])
def test_rounds_may_be_larger_than_the_ranks(make):
    assert make(4, 10).num_microbatches == 10  # two rounds of five
    message = (
        r"num_microbatches=11 must be a multiple of its 2 rounds.*use 8 or 12, mul"
    )
    with pytest.raises(ValueError, match=message):
        make(4, 11)


@pytest.mark.parametrize("make", INTERLEAVED)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_ranks": 0}, r"num_ranks=0 must be at least 1"),
        ({"num_microbatches": 0}, r"num_microbatches=0 must be at least 1"),
        ({"stages_per_rank": 0}, r"stages_per_rank=0 must be at least 1"),
        ({"stages_per_rank": 1.5}, r"stages_per_rank=1.5 must be an integer"),
    ],
)
def test_illegal_sizes(make, wrong, message):
    sizes = {"num_ranks": 2, "num_microbatches": 4, "stages_per_rank": 2} | wrong
    with pytest.raises(ValueError, match=message):
        make(**sizes)
