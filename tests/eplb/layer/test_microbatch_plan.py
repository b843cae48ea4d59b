"""Plans of a microbatch: what each must satisfy, and how even the devices are."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import ExpertTables, plan_microbatch
from tests.eplb.layer.plan_checks import apportion, check_plan, split_evenly

LOADS = Path(__file__).parents[2] / "data/eplb_loads_deepseek_v3.npz"
DEVICES, EXPERTS, PHYSICAL = 4, 8, 12


def random_placement(rng):
    """Each expert has a replica; some are empty, or beside another of their expert."""
    extra = rng.integers(-1, EXPERTS, PHYSICAL - EXPERTS)
    return rng.permutation(np.concatenate([np.arange(EXPERTS), extra]))


def random_counts(rng):
    """Even, skewed, from few devices, of one expert only, or none at all."""
    hot = rng.integers(EXPERTS)
    popular = rng.dirichlet(np.full(EXPERTS, rng.choice([0.1, 1.0, 50.0])))
    counts = rng.multinomial(rng.choice([1, 7, 1000]), popular, DEVICES)
    kind = rng.integers(5)
    if kind == 0:
        counts[:, hot] += 9 * counts.sum(axis=1)
    if kind == 1:
        counts[rng.permutation(DEVICES)[: rng.integers(1, DEVICES)]] = 0
    if kind == 2:
        counts[:, np.arange(EXPERTS) != hot] = 0
    return counts.astype(np.int32)


@functools.cache
def cases(num=200):
    rng = np.random.default_rng(0)
    placements = np.stack([random_placement(rng) for _ in range(num)])
    counts = np.stack([random_counts(rng) for _ in range(num)])
    counts[0] = 0
    return counts, placements, ExpertTables.from_placement(placements, EXPERTS)


@functools.cache
def plans(**options):
    counts, _, tables = cases()
    plan = functools.partial(plan_microbatch, **options)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(plan))(counts, tables))


@pytest.mark.parametrize(
    "options",
    [
        {"num_fetched": EXPERTS},
        {"num_fetched": EXPERTS, "num_nodes": 2},
        {"num_fetched": 1, "num_nodes": 2, "slack": 0.1},
        {"num_fetched": 0},
    ],
    ids=str,
)
def test_every_row_reaches_its_expert_and_devices_are_even(options):
    counts, placements, _ = cases()
    made = plans(**options)
    for i in range(len(counts)):
        plan = jax.tree.map(lambda leaf, i=i: leaf[i], made)
        check_plan(plan, counts[i], placements[i])
        if options["num_fetched"] == EXPERTS:
            assert plan.device_rows.max() == -(-counts[i].sum() // DEVICES)


def test_a_batch_of_plans_is_each_of_them():
    counts, _, tables = cases()
    made = plans(num_fetched=EXPERTS)
    plan = functools.partial(plan_microbatch, num_fetched=EXPERTS)
    for i in range(5):
        one = plan(counts[i], tables.layer(i))
        for ours, batched in zip(one, made, strict=True):
            np.testing.assert_array_equal(ours, batched[i])


def test_shared_rows_fill_devices_that_have_few():
    counts, placements, tables = cases()
    rng = np.random.default_rng(1)
    # As many as each device has tokens of three choices, and none on some devices.
    shared = counts.sum(axis=2) // 3 * rng.integers(0, 2, (len(counts), DEVICES))
    shared = shared.astype(np.int32)

    def plan(counts, tables, shared):
        return plan_microbatch(counts, tables, num_fetched=EXPERTS, shared=shared)

    made = jax.tree.map(np.asarray, jax.jit(jax.vmap(plan))(counts, tables, shared))
    without = plans(num_fetched=EXPERTS)
    for i in range(len(counts)):
        each = jax.tree.map(lambda leaf, i=i: leaf[i], made)
        check_plan(each, counts[i], placements[i], shared[i])
        total = counts[i].sum() + shared[i].sum()
        assert each.device_rows.max() == -(-total // DEVICES)
    # They do what fetched experts do else.
    fewer = [(plan.fetched >= 0).sum() for plan in (made, without)]
    assert fewer[0] < fewer[1]


def test_nodes_fetch_from_themselves_first():
    """Each node could even itself out; without nodes most experts would cross."""
    counts = np.zeros((8, 16), np.int32)
    counts[:, 0] = 50  # on device 0
    counts[:, 8] = 50  # on device 4
    tables = ExpertTables.from_placement(jnp.arange(16), 16)
    plan = plan_microbatch(counts, tables, num_fetched=2, num_nodes=2)
    check_plan(plan, counts, np.arange(16))
    assert plan.fetched.tolist() == [[-1, -1]] + 3 * [[0, -1]] + [[-1, -1]] + 3 * [
        [8, -1]
    ]
    assert set(plan.device_rows.tolist()) == {100}


def test_shares_follow_capacities():
    tables = ExpertTables.from_placement(jnp.arange(8), 8)
    counts = split_evenly(np.array([900, 0, 20, 30, 10, 10, 20, 10]), 4)
    capacity = np.array([1.0, 1.0, 0.5, 1.5], np.float32)
    plan = plan_microbatch(counts, tables, num_fetched=3, capacity=capacity)
    check_plan(plan, counts, np.arange(8))
    np.testing.assert_array_equal(plan.device_rows, [250, 250, 125, 375])


def test_slack_saves_fetches():
    tables = ExpertTables.from_placement(jnp.arange(8), 8)
    counts = split_evenly(np.array([60, 45, 50, 50, 52, 50, 48, 45]), 4)
    exact = plan_microbatch(counts, tables, num_fetched=2)
    loose = plan_microbatch(counts, tables, num_fetched=2, slack=0.05)
    assert (exact.device_rows == 100).all() and (exact.fetched >= 0).any()
    assert loose.device_rows.max() == 105 and (loose.fetched < 0).all()


@functools.cache
def recorded():
    """[recordings and layers, experts]: those of the 58 layers with experts."""
    with np.load(LOADS) as file:
        return np.concatenate([file[name][3:] for name in file])


@pytest.mark.parametrize(("devices", "num_fetched"), [(8, 8), (32, 8), (64, 4)])
def test_recorded_loads_become_even(devices, num_fetched):
    """32,768 rows a device; experts in order, without replicas."""
    totals = [apportion(load, devices * 32768) for load in recorded()]
    counts = np.stack([split_evenly(total, devices) for total in totals])
    tables = ExpertTables.from_placement(jnp.arange(256), 256)

    def plan(counts):
        made = plan_microbatch(counts, tables, num_fetched=num_fetched)
        return made.device_rows, (made.fetched >= 0).sum()

    device_rows, num_fetched = jax.jit(lambda counts: jax.lax.map(plan, counts))(counts)
    most = device_rows.max(axis=1) / 32768
    assert (most == 1).mean() >= 0.99 and most.max() <= 1.05
    if devices > 8:
        assert num_fetched.mean() / devices <= 1.2


def test_the_program_has_no_loop():
    counts = jnp.zeros((64, 256), jnp.int32)
    tables = ExpertTables.from_placement(jnp.arange(320) % 256, 256, 8)
    plan = jax.jit(functools.partial(plan_microbatch, num_fetched=4, num_nodes=8))
    assert "while" not in plan.lower(counts, tables).compile().as_text()


TABLES = ExpertTables.from_placement(jnp.arange(12) % 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": jnp.zeros(3, jnp.int32)}, r"shared has shape \(3,\); it must have"),
        ({"num_fetched": -1}, "num_fetched=-1 must be at least 0 and at most the 8"),
        ({"num_fetched": 9}, "num_fetched=9 must be at least 0 and at most the 8 exp"),
        ({"counts": np.zeros((4, 7), int)}, r"counts has shape \(4, 7\); it must be"),
        ({"counts": np.zeros((5, 8), int)}, "5 devices of counts must divide the 12"),
        ({"counts": np.zeros((4, 8))}, "counts are float32; they must be integers"),
        ({"num_nodes": 3}, "num_nodes=3 must divide the 4 devices of counts"),
        ({"slack": -0.1}, "slack=-0.1 must be at least 0 and finite"),
        ({"capacity": [1, 0, 1, 1]}, "capacity of device 1 is 0.0; it must be above 0"),
        ({"capacity": [1, 1]}, r"capacity has shape \(2,\); it must have one entry"),
        (
            {"tables": jax.tree.map(lambda leaf: leaf[None], TABLES)},
            "tables are of 1 layers; pass one layer's",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {"counts": np.zeros((4, 8), int), "tables": TABLES, "num_fetched": 1}
    with pytest.raises(ValueError, match=message):
        plan_microbatch(**arguments | change)
