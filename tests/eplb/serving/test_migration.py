"""From one placement to the next: as if gathered again, and only what changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from dualpipe_jax.gpu.topology import gpu_mesh
from eplb_jax.placement.tables import ExpertTables
from eplb_jax.serving.migration import count_migrated, migrate

EXPERTS, PHYSICAL, DEVICES = 10, 24, 8
MESH = jax.make_mesh((DEVICES,), ("ep",), axis_types=(AxisType.Auto,))


def placement(seed):
    rng = np.random.default_rng(seed)
    extra = rng.integers(-1, EXPERTS, PHYSICAL - EXPERTS)  # -1: empty
    return rng.permutation(np.concatenate([np.arange(EXPERTS), extra])).astype(np.int32)


def experts():
    rng = np.random.default_rng(0)
    return {
        "up": rng.standard_normal((EXPERTS, 6, 10)).astype(np.float32),
        "down": rng.standard_normal((EXPERTS, 7)).astype(jnp.bfloat16),
    }


def held(placed):
    """The weights of the physical experts of a placement, gathered by NumPy."""
    return jax.tree.map(
        lambda leaf: np.where(
            (placed >= 0).reshape(-1, *[1] * (leaf.ndim - 1)), leaf[placed], 0
        ).astype(leaf.dtype),
        experts(),
    )


def on_mesh(num_slices=None):
    def run(weights, old, new):
        return migrate(
            weights,
            old,
            new,
            num_devices=DEVICES,
            axis_name="ep",
            num_slices=num_slices,
        )

    return jax.jit(
        jax.shard_map(
            run,
            mesh=MESH,
            in_specs=(P("ep"), P(), P()),
            out_specs=P("ep"),
        )
    )


def check(run, old, new):
    tables = [ExpertTables.from_placement(each, EXPERTS) for each in (old, new)]
    got = run(held(old), *tables)
    for ours, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves(held(new)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_any_placement_to_any_other():
    run = on_mesh()
    for seed in range(6):
        check(run, placement(seed), placement(seed + 1))
    # All experts one further: a single long cycle, in which every expert moves.
    ring = np.arange(PHYSICAL, dtype=np.int32) % EXPERTS
    check(run, ring, np.roll(ring, 1))
    # One expert nearly everywhere: one device may have to send to all others.
    index = np.arange(PHYSICAL)
    most = np.where(index < EXPERTS, index, 3).astype(np.int32)
    check(run, np.where(most == 3, -1, most) + 4 * (index == 3), most)


@pytest.mark.parametrize("num_slices", [1, 3, 1000])
def test_slices_change_nothing(num_slices):
    check(on_mesh(num_slices), placement(0), placement(1))


def test_one_device():
    check(jax.jit(migrate), placement(0), placement(1))


def test_only_what_changed_is_sent():
    old = placement(0)
    tables = [ExpertTables.from_placement(old, EXPERTS)]
    assert not np.asarray(count_migrated(*tables * 2, DEVICES)).any()
    for num_changes in (1, 3, 6):
        new = old.copy()
        # Replicas of experts that have others become replicas of expert 0.
        count = np.bincount(old[old >= 0], minlength=EXPERTS)
        changed = []
        for physical in np.flatnonzero(old > 0):
            if count[old[physical]] > 1 and len(changed) < num_changes:
                count[old[physical]] -= 1
                changed.append(physical)
        new[changed] = 0
        after = ExpertTables.from_placement(new, EXPERTS)
        sent = np.asarray(count_migrated(tables[0], after, DEVICES))
        assert sent.sum() == len(changed) == num_changes
        # To the devices that gain, and from devices that have it.
        by_target = np.bincount(np.array(changed) // 3, minlength=DEVICES)
        np.testing.assert_array_equal(sent.sum(axis=0), by_target)
        has = np.isin(np.arange(DEVICES), np.flatnonzero(old == 0) // 3)
        assert not sent[~has].any()


def test_a_replica_on_the_same_device_is_taken_from_there():
    old = np.array([0, 1, 0, 2, 0, 3], np.int32)
    new = np.array([0, 1, 0, 0, 2, 3], np.int32)
    tables = [ExpertTables.from_placement(each, 4) for each in (old, new)]
    sent = np.asarray(count_migrated(*tables, 3))
    assert sent.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_weights_may_be_donated():
    tables = [ExpertTables.from_placement(placement(s), EXPERTS) for s in (0, 1)]
    weights = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.NamedSharding(MESH, P("ep"))),
        held(placement(0)),
    )
    run = jax.jit(on_mesh(), donate_argnums=0)
    got = run(weights, *tables)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(weights))
    np.testing.assert_array_equal(got["up"], held(placement(1))["up"])


def test_bad_arguments():
    old = ExpertTables.from_placement(placement(0), EXPERTS)
    wide = ExpertTables.from_placement(placement(0), EXPERTS, 20)
    layers = ExpertTables.from_placement(np.tile(placement(0), (2, 1)), EXPERTS)
    weights = held(placement(0))
    for args, options, message in [
        ((weights, old, wide), {}, "same numbers of experts and max_replicas"),
        ((weights, layers, layers), {}, "both must be of one layer"),
        (
            (weights, old, old),
            {"num_devices": 5},
            "num_devices=5 must divide the 24 physical experts",
        ),
        ((weights, old, old), {"num_slices": 0}, "num_slices=0 must be at least 1"),
        (
            (weights, old, old),
            {"num_devices": 2},
            r"weights\['down'\] has shape \(24, 7\), but a device holds 12 of 24 phys",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            migrate(*args, **options)


@pytest.mark.slow
def test_on_gpus_the_buffers_are_a_part_of_the_weights():
    mesh = gpu_mesh("h100", {"ep": DEVICES})

    def run(weights, old, new):
        return migrate(weights, old, new, num_devices=DEVICES, axis_name="ep")

    run = jax.shard_map(
        run, mesh=mesh, in_specs=(P("ep"), P(), P()), out_specs=P("ep"), check_vma=False
    )

    def struct(array, spec):
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    tables = ExpertTables.from_placement(placement(0), EXPERTS)
    tables = jax.tree.map(lambda leaf: struct(leaf, P()), tables)
    weights = struct(jax.ShapeDtypeStruct((PHYSICAL, 256, 512), jnp.bfloat16), P("ep"))
    compiled = jax.jit(run, donate_argnums=0).lower(weights, tables, tables).compile()
    memory = compiled.memory_analysis()
    held = PHYSICAL // DEVICES * 256 * 512 * 2
    assert memory.alias_size_in_bytes == held  # in place
    # A slice of the senders' rows, of the receivers', and of what is written back.
    assert memory.temp_size_in_bytes < held
    assert "ragged-all-to-all" in compiled.as_text()
