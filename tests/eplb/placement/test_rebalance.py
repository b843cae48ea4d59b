"""Upstream's policies: equal to upstream's own outputs and to a plain NumPy port."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from benchmarks import eplb_numpy
from eplb_jax.placement.arrays import divide
from eplb_jax.placement.greedy import sum_like_torch
from eplb_jax.placement.packing import balanced_packing, replicate_experts
from eplb_jax.placement.placement import rebalance_experts
from tests.eplb.placement.cases import SIZES, traced

DATA = Path(__file__).parents[2] / "data"
# Upstream's outputs, taken with its sort made stable.
GOLDEN = np.load(DATA / "eplb_cases.npz")
CASES = json.loads(GOLDEN["meta"].tobytes())
# float32 sums by torch 2.13.0 on x86-64, `values.sum(-1)`.
SUMS = np.load(DATA / "eplb_torch_sums.npz")
NAMES = ("num_replicas", "num_groups", "num_nodes", "num_gpus")


def loads(kind, seed, shape):
    rng = np.random.default_rng(seed)
    if kind == "lognormal":
        weight = rng.lognormal(0, 1.5, shape)
    elif kind == "ties":
        weight = rng.integers(0, 4, shape)
    elif kind == "mostly zero":
        weight = rng.integers(0, 100, shape) * (rng.random(shape) < 0.2)
    elif kind == "near ties":
        weight = 1e6 + rng.integers(0, 3, shape)
    else:
        weight = np.zeros(shape)
    return weight.astype(np.float32)


def check_equal(maps, expected):
    phy2log, log2phy, count = (np.asarray(array) for array in maps)
    assert phy2log.dtype == log2phy.dtype == count.dtype == np.int32
    width = expected[1].shape[-1]
    np.testing.assert_array_equal(phy2log, expected[0])
    np.testing.assert_array_equal(log2phy[..., :width], expected[1])
    assert (log2phy[..., width:] == -1).all()
    np.testing.assert_array_equal(count, expected[2])


# The quick tier has other sizes much like these.
SLOW = ("4", "5", "7", "8", "9", "10")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case["key"],
            marks=[pytest.mark.slow] if case["key"].split("_")[0] in SLOW else [],
        )
        for case in CASES
    ],
)
def test_equals_upstream(case):
    weight = GOLDEN[f"{case['key']}/weight"]
    expected = [GOLDEN[f"{case['key']}/{m}"] for m in ("phy2log", "log2phy", "logcnt")]
    sizes = [case[name] for name in NAMES]
    maps = rebalance_experts(weight, *sizes)
    check_equal(maps, expected)
    slack = sizes[0] - weight.shape[1] + 1
    assert maps.logical_to_physical_map.shape[-1] == slack


# (layers, experts, replicas, groups, nodes, gpus): each differs in what is degenerate.
SHAPES = [
    (3, 60, 72, 12, 3, 12),
    (2, 8, 8, 2, 2, 8),  # nothing to replicate, nothing to pack
    (3, 16, 34, 1, 17, 17),  # global, two physical experts per GPU
    (1, 5, 40, 5, 1, 1),  # one node, one GPU
    (1, 300, 400, 20, 10, 20),  # one layer with a row per node
]


@pytest.mark.parametrize("kind", ["lognormal", "ties", "mostly zero", "near ties", "0"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_numpy_port(shape, kind):
    num_layers, num_experts, *sizes = shape
    weight = loads(kind, hash(shape) % 1000, (num_layers, num_experts))
    expected = eplb_numpy.rebalance_experts(weight, *sizes)
    check_equal(rebalance_experts(weight, *sizes), expected)


def test_equals_the_numpy_port_on_recorded_loads():
    with np.load(DATA / "eplb_loads_deepseek_v3.npz") as file:
        weight = file["decode_in500out1500"][:58]  # the first three layers are zero
    for sizes in ((288, 8, 4, 32), (288, 1, 8, 144)):
        expected = eplb_numpy.rebalance_experts(weight, *sizes)
        check_equal(rebalance_experts(weight, *sizes), expected)


@pytest.mark.parametrize(
    "num_packs, per_pack", [(1, 1), (1, 5), (7, 2), (40, 1), (40, 5)]
)
@pytest.mark.parametrize("kind", ["lognormal", "ties", "mostly zero"])
def test_packing(num_packs, per_pack, kind):
    weight = loads(kind, num_packs * per_pack, (3, num_packs * per_pack))
    expected = eplb_numpy.balanced_packing(weight, num_packs)
    ours = jax.jit(balanced_packing, static_argnums=1)(weight, num_packs)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("num_experts", [1, 17, 100])
@pytest.mark.parametrize("num_extra", [0, 30])
@pytest.mark.parametrize("kind", ["lognormal", "ties", "0"])
def test_replication(num_experts, num_extra, kind):
    weight = loads(kind, num_experts, (3, num_experts))
    expected = eplb_numpy.replicate_experts(weight, num_experts + num_extra)
    replicate = jax.jit(replicate_experts, static_argnums=1)
    ours = replicate(weight, num_experts + num_extra)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_replication_respects_limits():
    weight = jnp.array([[9.0, 1.0, 1.0], [9.0, 1.0, 1.0]])
    _, _, count = replicate_experts(weight, 6, [jnp.array([2, 3])])
    assert count.tolist() == [[2, 2, 2], [3, 2, 1]]


@pytest.mark.parametrize("key", [key for key in SUMS if key.endswith("values")])
def test_sums_equal_torch(key):
    values, expected = SUMS[key], SUMS[key.replace("values", "sum")]
    ours = jax.jit(sum_like_torch)(values)
    np.testing.assert_array_equal(ours, expected)
    ports = [eplb_numpy.sum_as_torch_does(row) for row in values]
    np.testing.assert_array_equal(ports, expected)


def test_division_is_correctly_rounded():
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 9, 10000).astype(np.float32)
    count = rng.integers(1, 300, 10000)
    ours = divide(jnp.asarray(load), jnp.asarray(count, jnp.int32))
    np.testing.assert_array_equal(ours, load / count.astype(np.float32))


@pytest.mark.slow
def test_same_inside_and_outside_jit_and_under_vmap():
    weight = loads("lognormal", 0, (5, 3, 32))
    eager = [rebalance_experts(window, *SIZES) for window in weight]
    jitted, _ = traced("hierarchical")
    mapped = jax.vmap(lambda window: rebalance_experts(window, *SIZES))(weight)
    for i, expected in enumerate(eager):
        inside = jitted(weight[i], None, None)
        for name in expected._fields:
            one = getattr(expected, name)
            np.testing.assert_array_equal(one, getattr(inside, name))
            np.testing.assert_array_equal(one, getattr(mapped, name)[i])


def test_a_negative_zero_is_a_zero():
    weight = np.array([[0.0, -0.0, 0.0, 1.0]], np.float32)
    expected = rebalance_experts(np.abs(weight), 6, 1, 1, 2)
    check_equal(rebalance_experts(weight, 6, 1, 1, 2), expected)


def test_integer_counts_become_float32_as_in_upstream():
    weight = np.array([[2**40 + 1, 2**40, 7, 3]])
    expected = eplb_numpy.rebalance_experts(weight, 6, 1, 1, 2)
    check_equal(rebalance_experts(weight, 6, 1, 1, 2), expected)


def test_groups_that_nodes_do_not_divide_are_ignored_as_upstream_does():
    for weight, sizes in (
        ([[10, 20, 30, 40]], (8, 3, 2, 4)),
        (loads("lognormal", 0, (2, 12)), (16, 5, 2, 8)),
    ):
        weight = np.asarray(weight, np.float32)
        expected = eplb_numpy.rebalance_experts(weight, *sizes)
        check_equal(rebalance_experts(weight, *sizes), expected)


def test_policies_by_name():
    weight = loads("lognormal", 3, (3, 32))
    same = [
        (("auto", 8, 4), ("hierarchical", 8, 4)),
        (("auto", 8, 3), ("global", 8, 3)),
        (("global", 8, 4), ("global", 1, 1)),
        (("global", 5, 4), ("global", 1, 1)),  # 5 does not divide; groups are ignored
    ]
    for one, other in same:
        one, other = (
            rebalance_experts(weight, 48, groups, nodes, 12, policy=policy)
            for policy, groups, nodes in (one, other)
        )
        np.testing.assert_array_equal(one[0], other[0])
    strict = rebalance_experts(weight, 48, 8, 4, 12, policy="hierarchical")
    free = rebalance_experts(weight, 48, 8, 4, 12, policy="global")
    assert (np.asarray(strict[0]) != np.asarray(free[0])).any()


@pytest.mark.parametrize("policy", ["hierarchical", "soft"])
def test_lowers_for_gpus_and_never_asks_the_host(policy):
    def place(weight):
        return rebalance_experts(weight, *SIZES, policy=policy)

    weight = jax.ShapeDtypeStruct((3, 32), jnp.float32)
    module = export.export(jax.jit(place), platforms=["cuda"])(weight).mlir_module()
    assert "callback" not in module
    assert "stablehlo.while" in module
