"""Bias, load estimate and placement from step to step; physical experts' weights.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dualpipe_jax.deepseek import EplbConfig
from dualpipe_jax.deepseek.model.balancing import TrainingBalancer
from dualpipe_jax.deepseek.model.physical_experts import (
    gather_physical_experts,
    sum_replica_grads,
)
from eplb_jax import ExpertTables, rebalance_experts

LAYERS, EXPERTS, REDUNDANT, DEVICES = 2, 8, 4, 4
PHYSICAL = EXPERTS + REDUNDANT
EVERY, DECAY, RATE = 2, 0.5, 0.25
EPLB = EplbConfig(EVERY, REDUNDANT, decay=DECAY)
BALANCER = TrainingBalancer(
    num_layers=LAYERS,
    num_experts=EXPERTS,
    num_groups=1,
    num_devices=DEVICES,
    bias_update_rate=RATE,
    eplb=EPLB,
)
OBSERVE = jax.jit(BALANCER.observe)


def balancer(**changes):
    return dataclasses.replace(BALANCER, **changes)


def place(loads, num_physical=PHYSICAL):
    plan = rebalance_experts(loads.astype(np.float32), num_physical, 1, 1, DEVICES)
    return np.asarray(plan.physical_to_logical_map)


def make_counts(num_steps):
    """Tokens [steps, layers, experts]; hot experts change from step to step."""
    rng = np.random.default_rng(0)
    shape = (num_steps, LAYERS, EXPERTS)
    return (100 / (1 + rng.permuted(np.ones(shape).cumsum(-1), axis=-1))).astype("i4")


def mean_over_max(loads_LE, placement_LX):
    """Balancedness of each layer, one physical expert after another."""
    values = []
    for loads, experts in zip(loads_LE.astype(np.float64), placement_LX, strict=True):
        replicas = np.bincount(experts, minlength=len(loads))
        device = np.zeros(DEVICES)
        for physical, expert in enumerate(experts):
            at = physical // (len(experts) // DEVICES)
            device[at] += loads[expert] / replicas[expert]
        values.append(device.mean() / device.max())
    return np.array(values)


def test_each_layer_is_placed_every_few_steps_for_the_load_seen():
    router = BALANCER.init()
    placement = place(np.ones((LAYERS, EXPERTS)))
    np.testing.assert_array_equal(router.placement, placement)
    np.testing.assert_array_equal(router.bias, np.zeros((LAYERS, EXPERTS)))
    identity = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    total, weight = np.zeros((LAYERS, EXPERTS), np.float32), np.float32(0)
    bias, num_moves = np.zeros((LAYERS, EXPERTS)), 0
    for step, counts in enumerate(make_counts(4), start=1):
        # Sums of halves, quarters and eighths: exact, so that ties are the same.
        total = np.float32(DECAY) * total + counts.astype(np.float32)
        weight = np.float32(DECAY) * weight + np.float32(1)
        estimate = total / weight
        bias += RATE * np.sign(counts.mean(axis=1, keepdims=True) - counts)
        before = placement
        if step % EVERY == 0:
            placement = place(estimate)
            num_moves += (placement != before).any(axis=1).all()
        router, metrics = OBSERVE(router, counts, np.int32(step))
        np.testing.assert_array_equal(router.placement, placement)
        np.testing.assert_array_equal(router.bias, bias)
        want = {
            "balancedness": mean_over_max(counts, before).mean(),
            "balancedness_layers": mean_over_max(counts, before),
            "balancedness_unplaced": mean_over_max(counts, identity).mean(),
            "balancedness_next": mean_over_max(estimate, placement).mean(),
        }
        assert metrics.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6)  # float32
    assert num_moves == 2  # every layer's placement has changed both times
    assert metrics["balancedness_next"] > metrics["balancedness_unplaced"]


def test_without_redundant_experts_the_placement_stays_in_order():
    changed = balancer(eplb=None)
    router = changed.init()
    identity = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    for step, counts in enumerate(make_counts(2), start=1):
        router, metrics = changed.observe(router, counts, jnp.int32(step))
        np.testing.assert_array_equal(router.placement, identity)
        assert changed.tables(router) is None
        assert metrics.keys() == {"balancedness", "balancedness_layers"}
        want = mean_over_max(counts, identity)
        got = metrics["balancedness_layers"]
        np.testing.assert_allclose(got, want, rtol=1e-6)  # float32
        np.testing.assert_allclose(metrics["balancedness"], got.mean(), rtol=1e-6)


def test_a_new_number_of_physical_experts_is_placed_for_the_observed_load():
    """As after a resume with other redundancy."""
    counts = make_counts(1)[0]
    new = balancer(eplb=dataclasses.replace(EPLB, num_redundant=2 * REDUNDANT))
    fresh = BALANCER.init()
    np.testing.assert_array_equal(new.replan(fresh).placement, new.init().placement)
    router, _ = OBSERVE(fresh, counts, np.int32(1))
    again = new.replan(router)
    want = place(counts, EXPERTS + 2 * REDUNDANT)
    np.testing.assert_array_equal(again.placement, want)
    np.testing.assert_array_equal(again.bias, router.bias)
    assert (again.placement != new.init().placement).any()


def test_a_model_without_experts_has_nothing_to_balance():
    changed = balancer(num_layers=0)
    router = changed.init()
    assert router.placement.shape == (0, PHYSICAL)
    after, metrics = changed.observe(router, jnp.zeros((0, EXPERTS)), jnp.int32(EVERY))
    assert after is router and metrics == {}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EplbConfig(0, 4), "every=0 must be at least 1"),
        (lambda: EplbConfig(2.5, 4), r"every=2\.5 must be an integer"),
        (lambda: EplbConfig(1, 0.5), r"num_redundant=0\.5 must be an integer"),
        (lambda: EplbConfig(1, 4, num_nodes=0), "num_nodes=0 must be at least 1"),
        (lambda: EplbConfig(1, -1), "num_redundant=-1 must be at least 0"),
        (lambda: EplbConfig(1, 4, decay=1.0), r"decay=1\.0 must be below 1"),
        (
            lambda: balancer(num_experts=6),
            "num_experts=6 must be a multiple of the ep axis, 4",
        ),
        (
            lambda: balancer(eplb=EplbConfig(1, 3)),
            r"num_experts \+ num_redundant=11 must be a multiple of the ep axis, 4",
        ),
        (
            lambda: balancer(eplb=EplbConfig(1, 4, num_nodes=3)),
            "num_nodes=3 must divide the ep axis, 4",
        ),
        (
            lambda: balancer(
                num_groups=1, eplb=EplbConfig(1, 4, 2, policy="hierarchical")
            ),
            "num_nodes=2 must divide num_groups=1; use policy='global' or 'swaps'",
        ),
    ],
)
def test_numbers_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# From experts to physical experts and back, on meshes of eight devices.

MESHES = [{"pp": 2, "ep": 4}, {"pp": 2, "dp": 2, "ep": 2}]
MESH_CASES = [
    (mesh, leading, stages)
    for mesh in MESHES
    for leading, stages in (("pp", 4), (None, 1))
]


def moved(axes, leading):
    """Both directions, jitted; and how often they were traced."""
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )
    traces = []

    def both(experts, grads, placement_GX):
        traces.append(1)
        tables = ExpertTables.from_placement(placement_GX, EXPERTS)
        there = gather_physical_experts(experts, tables, mesh, leading)
        return there, sum_replica_grads(grads, tables, mesh, leading)

    return jax.jit(both), traces


def whole_numbers(rng, *shape):
    """Small ones, of which float32 and bfloat16 hold sums and products exactly."""
    return rng.integers(-4, 5, shape).astype(np.float32)


def draw_placement(rng, stages):
    """All experts, then some of them again, in any order; other ones in each stage."""
    rows = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), again]))
        for again in rng.integers(EXPERTS, size=(stages, REDUNDANT))
    ]
    return np.array(rows, np.int32)


@pytest.mark.parametrize("sizes, leading, stages", MESH_CASES)
def test_physical_experts_get_their_weights_and_give_back_their_gradients(
    sizes, leading, stages
):
    run, traces = moved(sizes, leading)
    rng = np.random.default_rng(stages)
    for _ in range(2):
        placement = draw_placement(rng, stages)
        x = {
            "matrix": whole_numbers(rng, stages, EXPERTS, 3, 2),
            "vector": whole_numbers(rng, stages, EXPERTS, 5).astype(jnp.bfloat16),
        }
        y = {
            "matrix": whole_numbers(rng, stages, PHYSICAL, 3, 2),
            "vector": whole_numbers(rng, stages, PHYSICAL, 5).astype(jnp.bfloat16),
        }
        there, back = run(x, y, placement)
        for name in x:
            assert there[name].dtype == x[name].dtype
            assert back[name].dtype == y[name].dtype
            want = np.stack([x[name][g, placement[g]] for g in range(stages)])
            np.testing.assert_array_equal(there[name], want)
            want = np.zeros(x[name].shape, np.float32)
            for g, p in np.ndindex(placement.shape):
                want[g, placement[g, p]] += y[name][g, p].astype(np.float32)
            np.testing.assert_array_equal(np.asarray(back[name], np.float32), want)
            # <gather(x), y> is <x, sum(y)>: one is the other's transpose.
            a, b, c, d = (
                np.asarray(leaf, np.float64).ravel()
                for leaf in (there[name], y[name], x[name], back[name])
            )
            assert a @ b == c @ d != 0
    assert len(traces) == 1  # a new placement is new values, not a new program
