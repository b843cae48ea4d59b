"""The choice of replicas: correct, and as even or as near as documented."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from eplb_jax.layer.replicas import balanced_shares, choose_physical_experts
from eplb_jax.placement.placement import rebalance_experts
from eplb_jax.placement.tables import ExpertTables

DATA = Path(__file__).parents[2] / "data"
EXPERTS, PHYSICAL, DEVICES, NODES, K = 12, 24, 8, 2, 3
MESH = jax.make_mesh((DEVICES,), ("ep",), axis_types=(AxisType.Auto,))


def tables(seed=0):
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, EXPERTS, PHYSICAL - EXPERTS)
    expert_of = rng.permutation(np.concatenate([np.arange(EXPERTS), extra]))
    return ExpertTables.from_placement(expert_of, EXPERTS)


def picks(num_tokens, seed=0):
    """K distinct experts per token, some of them popular; every fifth is padding.

    Padding has ids outside [0, EXPERTS).
    """
    rng = np.random.default_rng(seed)
    score = rng.random((num_tokens, EXPERTS)) * np.linspace(1, 3, EXPERTS)
    experts = np.argsort(-score, axis=1)[:, :K].astype(np.int32)
    padding = np.array([-1, EXPERTS, 2**31 - 1, -7], np.int32)
    experts[::5] = rng.choice(padding, experts[::5].shape)
    return experts


def is_padding(experts):
    return (experts < 0) | (experts >= EXPERTS)


def choose_on_mesh(experts, maps, choice):
    def choose(experts, maps):
        return choose_physical_experts(
            experts,
            maps,
            choice=choice,
            num_devices=DEVICES,
            num_nodes=NODES,
            axis_name="ep",
        )

    sharded = jax.shard_map(
        choose,
        mesh=MESH,
        in_specs=(P("ep"), P()),
        out_specs=P("ep"),
    )
    return np.asarray(jax.jit(sharded)(experts, maps))


@pytest.mark.parametrize("choice", ["spread", "nearest", "balanced"])
def test_a_replica_of_the_expert_and_the_same_again(choice):
    experts = picks(DEVICES * 40)
    physical = choose_on_mesh(experts, tables(), choice)
    expert_of = np.asarray(tables().physical_to_logical_map)
    chosen = ~is_padding(experts)
    assert (expert_of[physical][chosen] == experts[chosen]).all()
    assert (physical[~chosen] == -1).all()
    again = choose_on_mesh(experts, tables(), choice)
    np.testing.assert_array_equal(physical, again)


def test_spread_is_even_to_one():
    experts, maps = picks(997), tables()
    physical = np.asarray(jax.jit(choose_physical_experts)(experts, maps))
    for expert in range(EXPERTS):
        count = int(maps.expert_count[expert])
        used = np.asarray(maps.logical_to_physical_map[expert])[:count]
        served = [(physical == replica).sum() for replica in used]
        assert max(served) - min(served) <= 1


def test_the_choices_of_a_token_are_spread_independently():
    # Every token wants the same two experts, each on devices 0 and 1.
    maps = ExpertTables.from_placement(jnp.array([0, 1, 0, 1]), 2)
    experts = np.tile(np.array([[0, 1]], np.int32), (400, 1))
    device = np.asarray(jax.jit(choose_physical_experts)(experts, maps)) // 2
    both = np.bincount(device[:, 0] * 2 + device[:, 1], minlength=4)
    # Four equally likely outcomes: 100 each, five standard deviations of 8.7.
    assert (abs(both - 100) < 44).all()


def test_nearest_stays_on_the_device_then_on_the_node():
    experts, maps = picks(DEVICES * 40), tables(1)
    physical = choose_on_mesh(experts, maps, "nearest").reshape(DEVICES, -1)
    experts = experts.reshape(DEVICES, -1)
    per_device, per_node = PHYSICAL // DEVICES, DEVICES // NODES
    replicas = np.asarray(maps.logical_to_physical_map)
    for device in range(DEVICES):
        for expert in range(EXPERTS):
            at = replicas[expert][replicas[expert] >= 0] // per_device
            distance = np.where(
                at == device, 0, 1 + (at // per_node != device // per_node)
            )
            chosen = physical[device][experts[device] == expert]
            if not len(chosen):
                continue
            allowed = replicas[expert][: len(at)][distance == distance.min()]
            served = [(chosen == replica).sum() for replica in allowed]
            assert sum(served) == len(chosen)
            assert max(served) - min(served) <= 1


def test_balanced_is_even_where_spread_is_not():
    # Devices 0 and 1 hold expert 0; device 0 also has the only replica of expert 1.
    maps = ExpertTables.from_placement(jnp.array([0, 1, 0, 2]), 3)
    experts = np.array([[0]] * 60 + [[1]] * 40, np.int32)

    def loads(choice):
        choose = functools.partial(
            choose_physical_experts, choice=choice, num_devices=2
        )
        physical = jax.jit(choose)(experts, maps)
        return np.bincount(np.ravel(physical) // 2, minlength=2).tolist()

    assert loads("spread") == [70, 30]
    assert loads("balanced") == [50, 50]


@functools.cache
def recorded():
    with np.load(DATA / "eplb_loads_deepseek_v3.npz") as file:
        return file["prefill_in1024"][3:], file["prefill_in2048"][3:]


@pytest.mark.slow
def test_shares_on_recorded_loads():
    # A plan for earlier loads than those that it serves, as plans always are.
    planned, came = recorded()
    placement = rebalance_experts(planned, 288, 1, 1, 32)[0]
    maps = ExpertTables.from_placement(placement, 256, 33)
    shares = jax.jit(jax.vmap(lambda c, t: balanced_shares(c, t, 32)))(came, maps)
    replicas = np.asarray(maps.logical_to_physical_map)
    shares = np.asarray(shares, np.float64)
    assert (shares >= 0).all()
    assert not shares[replicas < 0].any()
    # float32 shares that add up to counts of up to 1e6
    np.testing.assert_allclose(shares.sum(axis=2), came, rtol=1e-5)
    even = came / np.asarray(maps.expert_count)

    def balance(share):
        scores = []
        for layer in range(len(came)):
            load = np.zeros(32)
            is_used = replicas[layer] >= 0
            np.add.at(load, replicas[layer][is_used] // 9, share[layer][is_used])
            scores.append(load.mean() / load.max())
        return np.array(scores)

    before, after = (
        balance(np.broadcast_to(even[..., None], replicas.shape)),
        balance(shares),
    )
    assert (after >= before - 1e-6).all()
    assert after.mean() > before.mean() + 0.03


@pytest.mark.parametrize("choice", ["spread", "nearest", "balanced"])
def test_without_replicas_or_without_tokens(choice):
    single = ExpertTables.from_placement(jnp.array([2, 0, 1, 3]), 4)
    experts = jnp.array([[4, 4], [3, 0], [-1, 99]])
    physical = choose_physical_experts(experts, single, choice=choice)
    assert physical.tolist() == [[-1, -1], [3, 1], [-1, -1]]
    none = choose_physical_experts(
        experts[:0], tables(), choice=choice, num_devices=DEVICES
    )
    assert none.shape == (0, 2) and none.dtype == jnp.int32


def test_bad_arguments():
    experts, maps = np.zeros((2, 1), np.int32), tables()
    layered = ExpertTables.from_placement(np.tile(np.arange(4), (3, 1)), 4)
    for options, message in [
        ({"choice": "best"}, "choice='best' must be one of spread, nearest, balanced"),
        ({"num_devices": 7}, "num_devices=7 must divide the 24 physical"),
        ({"num_devices": 8, "num_nodes": 3}, "num_nodes=3 must divide num_devices=8"),
        ({"tables": layered}, "tables are of 3 layers; pass one layer's"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_physical_experts(experts, options.pop("tables", maps), **options)
