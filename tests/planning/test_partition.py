"""Partitions of layers over stages, against a comparison of all of them."""

import functools
import itertools
import re

import numpy as np
import pytest

from dualpipe_jax.planning.partition import Partition, partition_layers
from dualpipe_jax.schedules.generators.dualpipe import dualpipe
from dualpipe_jax.schedules.generators.dualpipev import dualpipev
from dualpipe_jax.schedules.generators.gpipe import gpipe
from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
from dualpipe_jax.schedules.generators.zb1p import zb1p
from dualpipe_jax.schedules.schedule import Schedule, predecessors, result_of

# Costs of fewer than 20 layers, summed in another order, differ by less than 1e-14.
EQUAL = 1e-9


def interleaved(num_ranks, num_stages, num_microbatches=2):
    """GPipe-like: rank r runs the stages r, r + num_ranks, ..."""
    rows = []
    for rank in range(num_ranks):
        stages = range(rank, num_stages, num_ranks)
        forward = [f"{s}F{m}" for s in stages for m in range(num_microbatches)]
        backward = [f"{s}B{m}" for s in stages[::-1] for m in range(num_microbatches)]
        rows.append(",".join(forward + backward))
    return Schedule.from_csv("\n".join(rows), kind="interleaved")


# Stage 0 for 3 microbatches on rank 0 and 1 on rank 1; stage 1 the other way round.
UNEVEN = Schedule.from_csv(
    "0F0,0F1,0F2,1F3,1B3,0B0,0B1,0B2\n0F3,1F0,1F1,1F2,1B0,1B1,1B2,0B3", kind="uneven"
)
SCHEDULES = (
    dualpipe(2, 4),
    dualpipe(4, 8),
    dualpipev(1, 2),
    dualpipev(2, 4),
    dualpipev(3, 6),
    one_f_one_b(1, 3),
    one_f_one_b(3, 5),
    zb1p(4, 4),
    gpipe(5, 2),
    interleaved(2, 4),
    interleaved(2, 5),
    interleaved(3, 6),
    UNEVEN,
)


def measure(schedule, sizes, costs, embed_cost=0.0, head_cost=0.0, speeds=None):
    """(stage costs, rank costs) of stages with so many layers, task by task."""
    stops = list(itertools.accumulate(sizes))
    stages = [sum(costs[stop - n : stop]) for n, stop in zip(sizes, stops, strict=True)]
    stages[0] += embed_cost
    stages[-1] += head_cost
    ranks = [0.0] * schedule.num_ranks
    for stage, microbatch in itertools.product(
        range(schedule.num_stages), range(schedule.num_microbatches)
    ):
        rank = schedule.rank_of(stage, microbatch)
        ranks[rank] += stages[stage] / (speeds[rank] if speeds is not None else 1.0)
    return stages, ranks


@functools.cache
def all_partitions(num_layers, num_stages):
    """[num_partitions, num_stages]: where each stage ends."""
    cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
    return np.array([(*each, num_layers) for each in cuts])


def best_of_all(schedule, costs, max_layers=None, **kwargs):
    """The sizes that win by the documented rules among all contiguous partitions.

    All are compared at once; loads follow from those that `measure` finds for stages of
    unit cost.
    """
    num_layers, num_stages = len(costs), schedule.num_stages
    stops = all_partitions(num_layers, num_stages)
    sizes = np.diff(stops, axis=1, prepend=0)
    sums = np.array([0.0, *itertools.accumulate(costs)])
    stages = sums[stops] - sums[stops - sizes]
    stages[:, 0] += kwargs.pop("embed_cost", 0.0)
    stages[:, -1] += kwargs.pop("head_cost", 0.0)
    units = [
        measure(schedule, [1] * num_stages, np.eye(num_stages)[stage], **kwargs)[1]
        for stage in range(num_stages)
    ]
    loads = (stages @ np.array(units)).max(axis=1)
    squares = (stages**2).sum(axis=1)
    longest = sizes.max(axis=1)

    left = longest <= (max_layers or num_layers)
    left &= loads <= loads[left].min() * (1 + EQUAL)
    left &= longest == longest[left].min()
    left &= squares <= squares[left].min() * (1 + EQUAL)

    def outside_in(sizes):
        half = num_stages // 2
        pairs = zip(sizes[:half], sizes[::-1][:half], strict=True)
        return [size for pair in pairs for size in pair]

    return min(sizes[left].tolist(), key=outside_in)


def sizes_of(partition):
    return [len(stage) for stage in partition.layers]


def random_case(rng, schedule, num_layers):
    """Costs of one of three sorts, each with chances of ends, speeds and a limit."""
    costs = [
        rng.uniform(0.1, 2.0, num_layers),
        rng.choice([0.1, 0.2, 0.3], num_layers),  # many ties, in inexact sums
        rng.lognormal(0.0, 1.5, num_layers),
    ][rng.integers(3)].tolist()
    kwargs = {}
    if rng.random() < 0.5:
        kwargs |= {"embed_cost": rng.uniform(0, 1), "head_cost": rng.uniform(0, 5)}
    if rng.random() < 0.5:
        kwargs["speeds"] = rng.choice([0.5, 1.0, 1.7], schedule.num_ranks).tolist()
    if rng.random() < 0.3:
        least = -(-num_layers // schedule.num_stages)
        kwargs["max_layers"] = int(rng.integers(least, least + 2))
    return costs, kwargs


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_best_of_all_partitions(schedule):
    rng = np.random.default_rng(0)
    for spare in (0, 1, 2, 3, 5, 6):
        for _ in range(3):
            case = random_case(rng, schedule, schedule.num_stages + spare)
            costs, kwargs = case
            partition = partition_layers(costs, schedule, **kwargs)
            assert sizes_of(partition) == best_of_all(schedule, costs, **kwargs), case
            assert partition.is_optimal
            kwargs.pop("max_layers", None)
            stages, ranks = measure(schedule, sizes_of(partition), costs, **kwargs)
            np.testing.assert_allclose(partition.stage_costs, stages, rtol=EQUAL)
            np.testing.assert_allclose(partition.rank_costs, ranks, rtol=EQUAL)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_tables_agree_with_enumeration_on_layers_of_dominant_cost(schedule):
    # Limits that prune are then far from what most stages need.
    rng = np.random.default_rng(1)
    for _ in range(4):
        costs = rng.uniform(0.5, 1.5, schedule.num_stages + 6)
        costs[rng.integers(len(costs))] = 100.0
        kwargs = {"head_cost": float(rng.choice([0.0, 300.0]))}
        partition = partition_layers(costs, schedule, **kwargs)
        assert sizes_of(partition) == best_of_all(schedule, costs.tolist(), **kwargs)


@pytest.mark.parametrize("make", [dualpipe, dualpipev, one_f_one_b])
def test_tables_agree_with_enumeration_of_many_partitions(make):
    rng = np.random.default_rng(2)
    schedule = make(3 if make is dualpipev else 6, 12)
    for num_layers in (14, 20):
        costs = rng.uniform(0.1, 2, num_layers).tolist()
        partition = partition_layers(costs, schedule)
        assert sizes_of(partition) == best_of_all(schedule, costs)


# Just above 100,000 partitions, from where on not all of them are compared.
@pytest.mark.parametrize(
    ("schedule", "num_layers"),
    [(interleaved(2, 4), 87), (interleaved(2, 6), 30), (interleaved(3, 6), 30)],
    ids=repr,
)
def test_local_search_is_close_to_the_best(schedule, num_layers):
    rng = np.random.default_rng(3)
    ratios = []
    for _ in range(10):
        costs, kwargs = random_case(rng, schedule, num_layers)
        found = partition_layers(costs, schedule, **kwargs)
        assert not found.is_optimal
        assert found.max_layers <= kwargs.get("max_layers", num_layers)
        sizes = best_of_all(schedule, costs, **kwargs)
        kwargs.pop("max_layers", None)
        _, best = measure(schedule, sizes, costs, **kwargs)
        ratios.append(max(found.rank_costs) / max(best))
    assert min(ratios) >= 1 - EQUAL
    assert np.mean(ratios) < 1.01 and max(ratios) < 1.05


def test_local_search_of_many_interleaved_stages():
    schedule = interleaved(8, 32)
    partition = partition_layers([0.6] * 3 + [1.0] * 58, schedule, head_cost=1.6)
    assert not partition.is_optimal
    assert "there may be a better partition" in str(partition)
    # 8 ranks share 61.4 layers' worth, so that some rank has 8 in whole layers.
    assert max(partition.rank_costs) <= 2 * 8.0 * (1 + EQUAL)


def test_a_rank_counts_each_of_its_stages_for_its_own_microbatches():
    schedule = dualpipe(4, 10)
    partition = partition_layers([1.0] * 4, schedule, embed_cost=2.0, head_cost=6.0)
    assert partition.stage_costs == (3.0, 1.0, 1.0, 7.0)
    # Rank 0 embeds 5 microbatches, and has the loss of the 5 others.
    assert partition.rank_costs == (50.0, 10.0, 10.0, 50.0)
    assert partition.stage_ranks == ((0, 3), (1, 2), (1, 2), (0, 3))
    assert partition.balancedness == 0.6


def test_the_slower_of_two_ranks_with_the_same_stages_counts():
    # The outer pair of stages has a slow rank, the inner one has a fast rank in vain.
    costs, speeds = [1.0] * 12, [1.0, 9.0, 1.0, 0.5]
    partition = partition_layers(costs, dualpipe(4, 8), speeds=speeds)
    assert sizes_of(partition) == [2, 4, 4, 2]
    assert partition.rank_costs == (16.0, 32 / 9, 32.0, 32.0)


def test_shorter_stages_win_ties():
    # Any split of the pair has the same load, and no room is wasted by 3 and 3.
    assert sizes_of(partition_layers([1, 1, 1, 3, 3, 3], dualpipe(2, 4))) == [3, 3]
    assert sizes_of(partition_layers([1, 1, 1, 1, 4], dualpipe(2, 4))) == [3, 2]


def test_even_stages_win_further_ties():
    # Both [2, 3] and [3, 2] have the same load and room: 6 and 9, against 9 and 6.
    assert sizes_of(partition_layers([3, 3, 4, 1, 1], dualpipe(2, 4))) == [2, 3]
    assert sizes_of(partition_layers([1, 1, 4, 3, 3], dualpipe(2, 4))) == [3, 2]


def test_the_last_ties_leave_the_ends_short():
    assert sizes_of(partition_layers([1.0] * 5, one_f_one_b(4, 4))) == [1, 1, 2, 1]
    assert sizes_of(partition_layers([1.0] * 9, dualpipev(2, 4))) == [2, 2, 3, 2]


def test_rounding_decides_nothing():
    # 0.1 + 0.2 > 0.3 in float64, so that [2, 1] would lose to [1, 2] by an ulp.
    costs = [0.1, 0.2, 0.3, 0.3]
    exact = sizes_of(partition_layers([1, 2, 3, 3], one_f_one_b(3, 3)))
    assert sizes_of(partition_layers(costs, one_f_one_b(3, 3))) == exact == [2, 1, 1]


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 7e12, 1e200])
def test_units_decide_nothing(scale):
    costs = np.random.default_rng(4).uniform(0.5, 1.5, 17)
    schedule = dualpipev(3, 6)
    expected = partition_layers(costs, schedule, speeds=[1, 2, 1.5])
    found = partition_layers(costs * scale, schedule, speeds=[1e-3, 2e-3, 1.5e-3])
    assert found.layers == expected.layers


def test_forward_only_schedules_are_split_alike():
    costs = [0.5, 0.5, 1, 1, 1, 1, 1, 2]
    schedule = dualpipe(4, 8)
    forward = partition_layers(costs, schedule.forward_only())
    assert forward == partition_layers(costs, schedule)


# DeepSeek-V3: 61 layers, the first three dense, with a vocabulary of 129280. Parameters
# that a token meets in a layer: 187 M of attention and 396 M of FFN; 927 M in the head.
# Dense layers are cheaper by the all-to-all that they lack, here two fifths.
DEEPSEEK_V3 = [0.6] * 3 + [1.0] * 58
HEAD = 927 / 583


def test_deepseek_v3_over_16_ranks():
    partition = partition_layers(DEEPSEEK_V3, dualpipe(16, 32), head_cost=HEAD)
    print(partition)
    # 61.4 layers' worth for 8 pairs of ranks are 7.67 a pair: none is below 8 layers.
    assert max(partition.rank_costs) == pytest.approx(16 * 8.0, rel=EQUAL)
    assert partition.max_layers == 4
    assert partition.num_padding_layers == 3
    assert partition.balancedness > 0.95


def makespan(schedule, stage_costs):
    """When the last step ends, if every stage has its own cost (I = W = F)."""
    ends, free = {}, [0.0] * schedule.num_ranks
    for rank, position in schedule.dependency_order:
        step = schedule.steps[rank][position]
        needs = [need for task in step for need in predecessors(task, schedule)]
        start = max([free[rank], *(ends[need] for need in needs)])
        free[rank] = start + sum(
            stage_costs[task.stage] * (2 if task.op == "B" else 1) for task in step
        )
        ends |= {result_of(task): free[rank] for task in step}
    return max(free)


@pytest.mark.parametrize(
    "schedule", [dualpipe(16, 64), dualpipev(8, 64), one_f_one_b(16, 64)], ids=repr
)
def test_steps_take_less_time_than_with_layers_dealt_out_evenly(schedule):
    partition = partition_layers(DEEPSEEK_V3, schedule, head_cost=HEAD)
    even = [4] * 13 + [3] * 3
    for sizes in (even, even[::-1]):
        stages, ranks = measure(schedule, sizes, DEEPSEEK_V3, head_cost=HEAD)
        assert max(partition.rank_costs) <= max(ranks) * (1 + EQUAL)
        assert makespan(schedule, partition.stage_costs) <= makespan(schedule, stages)


def test_it_prints_what_it_did():
    partition = partition_layers([1, 1, 1, 4, 4], one_f_one_b(3, 2))
    assert str(partition) == (
        "stage  ranks  layers  cost\n"
        "    0      0     0-2     3\n"
        "    1      1       3     4\n"
        "    2      2       4     4\n"
        "the slowest rank (1) needs 8, 9.1 % more than the mean;\n"
        "4 padding layers in 3 stages x 3"
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"costs": [1.0] * 3}, "costs has 3 layers, fewer than the 4 stages of Sched"),
        ({"costs": [1, 2, 0, 4]}, r"costs\[2\]=0.0 must be positive and finite"),
        ({"costs": [1, np.nan, 1, 1]}, r"costs\[1\]=nan must be positive and finite"),
        ({"costs": [[1.0] * 4]}, r"costs has shape \(1, 4\), but must have one axis"),
        ({"costs": 3.0}, r"costs has shape \(\), but must have one axis"),
        ({"costs": ["a"] * 4}, r"costs=\['a', .*must be a sequence of positive numb"),
        ({"embed_cost": -1.0}, "embed_cost=-1.0 must be a finite number >= 0"),
        ({"head_cost": np.inf}, "head_cost=inf must be a finite number >= 0"),
        ({"head_cost": None}, "head_cost=None must be a finite number >= 0"),
        (
            {"speeds": [1.0] * 3},
            "speeds has 3 entries, but .* 4 ranks; give one per rank",
        ),
        ({"speeds": [1, 1, -1, 1]}, r"speeds\[2\]=-1.0 must be positive and finite"),
        ({"max_layers": 2}, "max_layers=2 leaves room for 8 of 9 layers .* use 3 or"),
        ({"max_layers": 0}, "max_layers=0 must be at least 1"),
        ({"max_layers": 2.5}, "max_layers=2.5 must be an integer"),
    ],
)
def test_errors_name_argument_value_and_remedy(kwargs, message):
    costs = kwargs.pop("costs", [1.0] * 9)
    with pytest.raises(ValueError, match=message):
        partition_layers(costs, dualpipe(4, 8), **kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ((0,), (2,))}, re.escape("layers=((0,), (2,)) must be 0, 1, 2, ")),
        ({"layers": ((0, 1), ())}, "with one or more in every stage"),
        ({"stage_costs": (1.0,)}, "must have one entry for each of the 2 stages"),
    ],
)
def test_a_partition_validates_itself(change, message):
    good = {
        "layers": ((0,), (1,)),
        "stage_costs": (1.0, 1.0),
        "rank_costs": (2.0, 2.0),
        "stage_ranks": ((0,), (1,)),
    }
    assert Partition(**good).num_layers == 2
    with pytest.raises(ValueError, match=message):
        Partition(**good | change)
