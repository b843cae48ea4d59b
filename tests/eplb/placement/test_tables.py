"""Tables: upstream's tuple, a pytree of fixed shapes, validated, compared by a hash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eplb_jax.placement.placement import rebalance_experts
from eplb_jax.placement.tables import ExpertTables
from tests.eplb.placement.cases import SIZES, lognormal


def random_tables(seed, num_layers=3, num_experts=12, num_replicas=20, **options):
    rng = np.random.default_rng(seed)
    placement = np.concatenate(
        [
            np.tile(np.arange(num_experts), (num_layers, 1)),
            rng.integers(-1, num_experts, (num_layers, num_replicas - num_experts)),
        ],
        axis=1,
    )
    placement = rng.permuted(placement, axis=1).astype(np.int32)
    return ExpertTables.from_placement(placement, num_experts, **options)


def test_both_directions_agree():
    tables = random_tables(0)
    for layer, expert in np.ndindex(3, 12):
        physical = np.flatnonzero(tables.physical_to_logical_map[layer] == expert)
        count = tables.expert_count[layer, expert]
        assert count == len(physical)
        row = np.asarray(tables.logical_to_physical_map[layer, expert])
        np.testing.assert_array_equal(row[:count], physical)
        assert (row[count:] == -1).all()
    assert tables.is_valid().all()


def test_rebalance_gives_upstreams_tuple_of_valid_maps():
    for policy in ("auto", "global"):
        tables = rebalance_experts(lognormal(0), *SIZES, policy=policy)
        tables.validate()
        physical_to_logical, logical_to_physical, count = tables
        assert physical_to_logical is tables.physical_to_logical_map
        assert logical_to_physical is tables.logical_to_physical_map
        assert count is tables.expert_count


def test_tables_of_a_placement_agree_with_upstreams_maps():
    maps = rebalance_experts(lognormal(1, 4, 12), 16, 4, 2, 8)
    again = ExpertTables.from_placement(maps.physical_to_logical_map, 12)
    np.testing.assert_array_equal(again.expert_count, maps.expert_count)
    # Upstream lists the replicas of an expert in the order in which it made them.
    ordered = np.sort(np.asarray(maps.logical_to_physical_map), axis=-1)
    np.testing.assert_array_equal(
        np.sort(np.asarray(again.logical_to_physical_map), axis=-1), ordered
    )


def test_a_new_placement_does_not_recompile():
    traces = []

    @jax.jit
    def route(tables, expert):
        traces.append(1)
        return tables.logical_to_physical_map[:, expert, 0]

    for seed in range(3):
        route(random_tables(seed), 5)
    assert len(traces) == 1


def test_layers_come_apart_in_scan_and_vmap():
    tables = random_tables(1)
    one_by_one = jnp.stack([tables.layer(i).checksum() for i in range(3)])
    _, scanned = lax.scan(lambda _, layer: (None, layer.checksum()), None, tables)
    mapped = jax.vmap(lambda layer: layer.checksum())(tables)
    assert tables.layer(2).is_valid().shape == ()
    for other in (tables.checksum(), scanned, mapped):
        np.testing.assert_array_equal(one_by_one, other)


def test_any_change_changes_the_checksum():
    tables = random_tables(2)
    names = ("physical_to_logical_map", "logical_to_physical_map")
    seen = {int(tables.checksum()[0])}
    for name in names:
        leaf = np.asarray(getattr(tables, name))
        for at in np.ndindex(leaf.shape[1:]):
            changed = leaf.copy()
            changed[(0, *at)] += 1
            other = tables._replace(**{name: jnp.asarray(changed)})
            assert (other.checksum()[1:] == tables.checksum()[1:]).all()
            seen.add(int(other.checksum()[0]))
    assert len(seen) == 1 + sum(getattr(tables, name)[0].size for name in names)


@pytest.mark.parametrize(
    "name, at, value",
    [
        ("physical_to_logical_map", (1, 4), 11),
        ("physical_to_logical_map", (1, 4), -1),
        ("logical_to_physical_map", (1, 3, 0), 99),
        ("logical_to_physical_map", (1, 3, 0), -1),
        ("logical_to_physical_map", (1, 3, 8), 0),
        ("expert_count", (1, 3), 0),
        ("expert_count", (1, 3), 9),
    ],
)
def test_a_broken_table_is_noticed(name, at, value):
    tables = random_tables(3)
    leaf = getattr(tables, name)
    assert leaf[at] != value
    broken = tables._replace(**{name: leaf.at[at].set(value)})
    assert broken.is_valid().tolist() == [True, False, True]
    assert jax.jit(lambda t: t.is_valid())(broken).tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"layer 1 (has|contradict)"):
        broken.validate()
    tables.validate()


def test_bad_input():
    with pytest.raises(ValueError, match="Expert 2 of layer 0 has no replica"):
        ExpertTables.from_placement(jnp.array([[0, 1, 1]]), 3)
    with pytest.raises(ValueError, match="more than max_replicas=1 replicas"):
        ExpertTables.from_placement(jnp.array([[0, 1, 1]]), 2, max_replicas=1)
    with pytest.raises(ValueError, match="max_replicas=0 must be at least 1"):
        ExpertTables.from_placement(jnp.array([[0, 1]]), 3)
    with pytest.raises(ValueError, match="holds 3, but there are 3 experts"):
        ExpertTables.from_placement(jnp.array([[0, 1, 2, 3]]), 3)
    with pytest.raises(ValueError, match=r"is float32\[1, 2\], but experts are int"):
        ExpertTables.from_placement(jnp.array([[0.9, 1.2]]), 2)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 2\)"):
        ExpertTables.from_placement(jnp.zeros((1, 1, 2), jnp.int32), 2)
    tables = random_tables(0)
    wrong = tables._replace(expert_count=tables.expert_count[:, :-1])
    with pytest.raises(ValueError, match="shapes of the three maps do not agree"):
        wrong.validate()
