"""The planner of sglang-jax's signature and its arrays, as that engine reads them."""

import enum

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sglang_jax as loops
from eplb_jax import ExpertTables, balancedness, write_placement
from eplb_jax.sglang_jax import (
    expert_location_arrays,
    rebalance_experts,
    update_metadata,
)
from tests.eplb.sglang_jax import engine

LAYERS, EXPERTS, PHYSICAL, LOCAL = 3, 16, 24, 6


class EplbAlgorithm(enum.Enum):
    deepseek = enum.auto()
    deepseek_hierarchical = enum.auto()


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    return rng.lognormal(6, 1.2, (LAYERS, EXPERTS)).astype(np.int64)


@pytest.mark.parametrize("algorithm", EplbAlgorithm)
@pytest.mark.parametrize("kind", ["drawn", "equal", "zero", "one expert", "one layer"])
def test_maps_are_those_of_the_engines_loops(algorithm, kind, counts):
    if kind == "equal":
        counts = np.full_like(counts, 7)
    elif kind == "zero":
        counts = counts * 0
    elif kind == "one expert":  # it gets every replica
        counts = np.where(np.arange(EXPERTS) == 5, 10**6, 0)[None]
    elif kind == "one layer":
        counts = counts[0]
    sizes = (PHYSICAL, LOCAL, 4, 2)
    expected = loops.rebalance_experts(counts, *sizes, algorithm.name)
    found = rebalance_experts(counts, *sizes, algorithm)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is np.ndarray and one.dtype == np.int64
        np.testing.assert_array_equal(one, other)


def test_no_groups_and_more_replicas_than_usual():
    skewed = np.ones((1, 2), np.int64) * [10**6, 1]
    for width, physical in ((7, 8), (63, 64)):
        _, places, count = rebalance_experts(skewed, physical, 4, None, 1, "deepseek")
        assert count.tolist() == [[width, 1]] and places.shape == (1, 2, width)


@pytest.mark.slow
def test_our_own_policies_balance_better(counts):
    sizes = (PHYSICAL, LOCAL, None, 1)
    names = "deepseek", "swaps"
    plans = [rebalance_experts(counts, *sizes, name)[0] for name in names]
    upstream, swaps = (np.asarray(balancedness(counts, each, 4)) for each in plans)
    assert (swaps >= upstream - 1e-6).all() and swaps.min() > 0.99


def test_what_the_planner_refuses(counts):
    for changes, message in (
        ({"algorithm": "elastic"}, "algorithm='elastic' must be one of deepseek"),
        ({"num_local_physical_experts": 5}, "=5 must divide num_physical_experts=24"),
        ({"num_local_physical_experts": 0}, "=0 must divide num_physical_experts=24"),
        ({"tokens_per_expert": -counts}, "not negative"),
        ({"num_groups": 3, "algorithm": "hierarchical"}, "num_groups=3 must divide"),
    ):
        arguments = {
            "tokens_per_expert": counts,
            "num_physical_experts": PHYSICAL,
            "num_local_physical_experts": LOCAL,
            "num_groups": 4,
            "num_nodes": 2,
            "algorithm": "deepseek",
        }
        with pytest.raises(ValueError, match=message):
            rebalance_experts(**arguments | changes)


def placement(seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(PHYSICAL) % EXPERTS) for _ in range(3)])


def test_arrays_are_those_that_the_engine_makes_of_a_file(tmp_path):
    rows = placement(0)
    expected = engine.metadata_of(rows, EXPERTS)
    for name in ("maps.npy", "maps.json"):
        write_placement(tmp_path / name, rows)
        found = engine.read_initial_location(tmp_path / name)
        np.testing.assert_array_equal(found["physical_to_logical_map"], rows)
    arrays = expert_location_arrays(ExpertTables.from_placement(rows, EXPERTS, 2))
    for name, array in arrays._asdict().items():
        np.testing.assert_array_equal(array, getattr(expected, name))


@pytest.mark.parametrize("algorithm", ["static", "dynamic"])
def test_an_updated_placement_is_read_without_compiling(algorithm):
    """Layer 0 of four is dense; its tokens' ids are not looked up."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, EXPERTS, (64, 2)))
    first, second = (
        np.concatenate([[np.arange(PHYSICAL) % EXPERTS], placement(seed)])
        for seed in (0, 1)
    )
    old = engine.metadata_of(first, EXPERTS, algorithm)
    new = engine.metadata_of(second, EXPERTS, algorithm)

    @jax.jit
    def look_up(info):
        return jnp.stack([engine.physical_ids(ids, info, layer) for layer in (1, 2, 3)])

    tables = ExpertTables.from_placement(second[1:], EXPERTS, 2)
    updated = update_metadata(old, tables, layers=[1, 2, 3])
    before, found = look_up(old), look_up(updated)
    np.testing.assert_array_equal(found, look_up(new))
    assert (before != found).any() and look_up._cache_size() == 1
    # It works inside of jit, too, and the old object stays as it was.
    inside = jax.jit(lambda info, tables: update_metadata(info, tables, [1, 2, 3]))
    np.testing.assert_array_equal(look_up(inside(old, tables)), found)
    np.testing.assert_array_equal(look_up(old), before)
    with pytest.raises(ValueError, match="make tables of the metadata's max_replicas"):
        update_metadata(old, ExpertTables.from_placement(second, EXPERTS, 3))
