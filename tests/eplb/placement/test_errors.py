"""Errors name argument and reason; inside jit, values are checked on request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from eplb_jax.placement.placement import rebalance_experts
from eplb_jax.placement.refine import refine_placement
from tests.eplb.placement.cases import lognormal, traced

WEIGHT = np.random.default_rng(0).lognormal(0, 1, (2, 12)).astype(np.float32)
GOOD = {"num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_replicas": 8}, "num_replicas=8 is less than the number of experts 12"),
        ({"num_replicas": 17}, "num_replicas=17 must be a multiple of num_gpus=8"),
        ({"num_nodes": 3}, "num_gpus=8 must be a multiple of num_nodes=3"),
        ({"num_groups": 8}, "num_groups=8 must divide the number of experts 12"),
        (
            {"num_groups": 10, "policy": "hierarchical"},
            "num_groups=10 must divide the number of experts 12",
        ),
        ({"num_gpus": 0}, "num_gpus=0 must be a positive int"),
        ({"num_nodes": 0}, "num_nodes=0 must be a positive int"),
        ({"num_replicas": 16.0}, "num_replicas=16.0 must be a positive int"),
        ({"policy": "soft", "num_groups": 5}, "num_groups=5 must divide the number"),
        ({"policy": "best"}, "policy='best' must be one of auto, hierarchical"),
        ({"policy": "soft", "num_groups": 3}, "num_nodes=2 must divide num_groups=3"),
        ({"policy": "hierarchical", "num_groups": 3}, "use policy='global' or 'swaps'"),
        ({"max_replicas": 0}, "max_replicas=0 must be at least 1"),
        ({"device_capacity": [1] * 8}, "takes no device_capacity"),
        (
            {"policy": "soft", "device_capacity": [1] * 4},
            r"device_capacity has shape \(4,\), but there are 8 devices",
        ),
        (
            {"policy": "soft", "device_capacity": [1] * 7 + [-1]},
            "device_capacity must be finite and not negative",
        ),
        (
            {"policy": "swaps", "device_capacity": [1] * 5 + [0] * 3},
            "leaves 5 of 8 devices alive, with 10 physical experts for 12 experts",
        ),
    ],
)
def test_sizes_and_options(changes, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(WEIGHT, **{**GOOD, **changes})


@pytest.mark.parametrize(
    "bad, said", [(np.nan, "nan"), (-1, "-1.0"), (np.inf, "inf"), (1e39, "inf")]
)
@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_values(bad, said, of):
    weight = WEIGHT.astype(np.float64)
    weight[1, 7] = bad
    if of is jnp.asarray:
        if bad == 1e39:
            weight = weight.clip(max=np.inf)
            weight[1, 7] = np.inf
        weight = jnp.asarray(weight.astype(np.float32))
    with pytest.raises(ValueError, match=rf"weight\[1, 7\] is {said}"):
        rebalance_experts(weight, **GOOD)


@pytest.mark.parametrize("shape", [(12,), (1, 2, 12), ()])
def test_rank(shape):
    with pytest.raises(ValueError, match=r"must be \[layers, experts\]"):
        rebalance_experts(np.ones(shape), **GOOD)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_complex_loads(of):
    with pytest.raises(
        ValueError, match=r"weight is complex64\[2, 12\], but loads are"
    ):
        rebalance_experts(of(WEIGHT.astype(np.complex64)), **GOOD)


def test_a_map_that_is_too_narrow_is_refused():
    weight = np.ones((2, 12))
    weight[0, 3] = 1000
    maps = rebalance_experts(weight, **GOOD, max_replicas=3)
    assert int(maps.expert_count.max()) == 3  # one node's copies
    with pytest.raises(ValueError, match=r"max_replicas=2 is too small: .* 3 replicas"):
        rebalance_experts(weight, **GOOD, max_replicas=2)


def with_value(weight, bad):
    weight = np.array(weight)
    weight[1, 7] = bad
    return weight


def test_traced_values_are_checked_on_request():
    def place(weight):
        return rebalance_experts(weight, **GOOD, check_values=True)[0]

    checked = jax.jit(checkify.checkify(place))
    assert checked(WEIGHT)[0].get() is None
    for bad in (np.nan, -1.0, np.inf):
        error, _ = checked(with_value(WEIGHT, bad))
        assert "weight must be finite and not negative" in error.get()


def test_traced_widths_are_checked_on_request():
    def place(weight):
        return rebalance_experts(weight, **GOOD, max_replicas=2, check_values=True)

    checked = jax.jit(checkify.checkify(place))
    even = jnp.ones((2, 12))
    assert checked(even)[0].get() is None
    hot = even.at[0, 3].set(1000.0)
    assert "max_replicas=2 is too small" in checked(hot)[0].get()


@pytest.mark.slow
def test_traced_capacities_are_checked_on_request():
    def place(weight, capacity):
        return rebalance_experts(
            weight,
            **GOOD,
            policy="swaps",
            device_capacity=capacity,
            max_replicas=2,
            check_values=True,
        )

    checked = jax.jit(checkify.checkify(place))
    even, alive = jnp.ones((2, 12)), jnp.ones(8)
    assert checked(even, alive)[0].get() is None
    hot = even.at[0, 3].set(1000.0)
    error, maps = checked(hot, alive)
    assert error.get() is None  # the search knows the width
    assert int(maps.expert_count.max()) == 2
    dead = alive.at[:3].set(0.0)
    assert "leave a physical expert for each of 12" in checked(even, dead)[0].get()
    error, maps = checked(with_value(even, np.nan), alive)
    assert "weight must be finite and not negative" in error.get()
    assert set(np.asarray(maps[0][1])) == set(range(12))  # still a placement


@pytest.mark.parametrize("policy", ["hierarchical", "global"])
def test_unchecked_bad_values_still_give_a_placement(policy):
    # Inside jit values are not checked by default; the result must still be valid.
    place, _ = traced(policy)
    for bad in (np.nan, -3.0, np.inf):
        weight = with_value(lognormal(0), bad)
        place(weight, None, None).validate()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_gpus": 5}, "num_gpus=5 must divide the 16 physical experts"),
        ({"max_moves": -1}, "max_moves=-1 must not be negative"),
        ({"num_nodes": 3}, "num_gpus=8 must be a multiple of num_nodes=3"),
        ({"weight": WEIGHT[:1]}, "but weight has 1 layers"),
        ({"weight": WEIGHT[:, :11]}, "holds 11, but weight has 11 experts"),
        ({"weight": -WEIGHT}, "weight must be finite and not negative"),
        ({"device_capacity": [0] * 8}, "leaves 0 of 8 devices alive"),
        ({"max_moves": 2.5}, "max_moves=2.5 must be an integer"),
        (
            {"device_capacity": [1, 1, 0, 1, 1, 1, 1, 1], "max_moves": 1},
            "max_moves=1 cannot bring back the 2 experts of layer 0 .* max_moves=2",
        ),
    ],
)
def test_refinement(changes, message):
    placement = np.tile(np.arange(16) % 12, (2, 1))
    arguments = {"weight": WEIGHT, "num_gpus": 8, "max_moves": 4, **changes}
    weight = arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        refine_placement(weight, placement, **arguments)


def test_a_plan_that_fails_leaves_the_old_tables_alone():
    tables = rebalance_experts(WEIGHT, **GOOD)
    before = jax.tree.map(np.array, tables)
    with pytest.raises(ValueError, match="not negative"):
        refine_placement(-WEIGHT, tables.physical_to_logical_map, 8, max_moves=4)
    for one, other in zip(
        jax.tree.leaves(before), jax.tree.leaves(tables), strict=True
    ):
        np.testing.assert_array_equal(one, other)
