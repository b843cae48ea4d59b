"""Rows to physical experts and back, against a loop over choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from dualpipe_jax.gpu.topology import gpu_mesh
from eplb_jax.layer.choices import combine_choices, dispatch_choices
from eplb_jax.layer.dispatch import combine, dispatch_tokens
from eplb_jax.layer.dispatch_plan import plan_dispatch
from eplb_jax.layer.exchange import Segments, exchange

DEVICES, TOKENS, K, PHYSICAL, DIM = 8, 6, 2, 24, 4
PER_DEVICE = PHYSICAL // DEVICES
MESH = jax.make_mesh((DEVICES,), ("ep",), axis_types=(AxisType.Auto,))


def on_mesh(fn, num_in):
    return jax.jit(
        jax.shard_map(
            fn,
            mesh=MESH,
            in_specs=(P("ep"),) * num_in,
            out_specs=P("ep"),
            check_vma=False,
        )
    )


def choices(seed=0):
    """[tokens, K] physical experts, more than a fifth of them out of range."""
    rng = np.random.default_rng(seed)
    num_tokens = DEVICES * TOKENS
    physical = np.array([rng.permutation(PHYSICAL)[:K] for _ in range(num_tokens)])
    physical[rng.random(physical.shape) < 0.2] = -1
    physical[rng.random(physical.shape) < 0.05] = PHYSICAL + 1
    physical[: TOKENS + 2, 0] = 5  # a popular one
    return physical.astype(np.int32)


def is_sent(physical):
    return (physical >= 0) & (physical < PHYSICAL)


def expected_rows(x, physical, num_rows):
    """What arrives: each device's rows by physical expert, then by sender."""
    arrived = [[] for _ in range(DEVICES)]
    for device in range(DEVICES):
        mine = physical.reshape(DEVICES, TOKENS * K)[device]
        for n in np.argsort(mine, kind="stable"):
            if not is_sent(mine[n]):
                continue
            if len(arrived[mine[n] // PER_DEVICE]) < num_rows:
                arrived[mine[n] // PER_DEVICE].append((mine[n], device, n))
    rows = np.zeros((DEVICES, num_rows, DIM), np.float32)
    sizes = np.zeros(PHYSICAL, int)
    for device, found in enumerate(arrived):
        for m, (expert, sender, n) in enumerate(sorted(found)):
            rows[device, m] = x[sender * TOKENS + n // K]
            sizes[expert] += 1
    return rows.reshape(-1, DIM), sizes, sum(map(len, arrived))


@pytest.mark.parametrize("num_rows", [None, 5])
def test_against_a_loop(num_rows):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((DEVICES * TOKENS, DIM)).astype(np.float32)
    physical = choices()

    def run(x, physical):
        plan = plan_dispatch(
            physical, PHYSICAL, num_devices=DEVICES, axis_name="ep", num_rows=num_rows
        )
        rows = dispatch_tokens(x, plan, axis_name="ep")
        # Each expert multiplies by its number, so that a misplaced row shows.
        expert = jnp.repeat(
            jnp.arange(PER_DEVICE), plan.group_sizes, total_repeat_length=len(rows)
        ) + PER_DEVICE * jax.lax.axis_index("ep")
        factor = (expert[:, None] + 1).astype(rows.dtype)
        back = combine_choices(rows * factor, plan, axis_name="ep")
        added = combine(rows * factor, plan, TOKENS, axis_name="ep")
        return (
            rows,
            back,
            added,
            plan.group_sizes,
            plan.tokens_per_physical_expert,
            plan.overflow[None],
        )

    rows, back, added, sizes, counts, overflow = map(
        np.asarray, on_mesh(run, 2)(x, physical)
    )
    room = DEVICES * TOKENS * K if num_rows is None else num_rows
    want, want_sizes, num_arrived = expected_rows(x, physical, room)
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_array_equal(sizes, want_sizes)
    chosen = np.bincount(physical[is_sent(physical)], minlength=PHYSICAL)
    counts = counts.reshape(DEVICES, PHYSICAL)
    np.testing.assert_array_equal(counts, [chosen] * DEVICES)
    assert (overflow == chosen.sum() - num_arrived).all()
    assert (overflow > 0).all() == (num_rows is not None)
    choice = physical.reshape(-1)
    result = np.repeat(x, K, axis=0) * (choice[:, None] + 1).astype(np.float32)
    if num_rows is None:
        is_sent_C1 = is_sent(choice)[:, None]
        np.testing.assert_array_equal(back, np.where(is_sent_C1, result, 0))
    else:
        is_served = back.any(axis=1)
        assert is_served.sum() == num_arrived
        np.testing.assert_array_equal(back[is_served], result[is_served])
    # float32: the order of K sums.
    each = back.reshape(-1, K, DIM).sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(added, each, rtol=1e-6, atol=1e-5)


def inner(a, b):
    return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum()


@pytest.mark.parametrize("per_choice", [False, True])
def test_dispatch_and_combine_are_each_others_transpose(per_choice):
    physical = choices(2)

    def run(x, y, physical):
        plan = plan_dispatch(physical, PHYSICAL, num_devices=DEVICES, axis_name="ep")

        def there(x):
            dispatch = dispatch_choices if per_choice else dispatch_tokens
            return dispatch(x, plan, axis_name="ep")

        def back(y):
            if per_choice:
                return combine_choices(y, plan, axis_name="ep")
            return combine(y, plan, TOKENS, axis_name="ep")

        sent, pull_sent = jax.vjp(there, x)
        returned, pull_returned = jax.vjp(back, y)
        products = [inner(sent, y), inner(x, pull_sent(y)[0])]
        products += [inner(returned, x), inner(y, pull_returned(x)[0])]
        return jnp.stack(products)[None]

    rng = np.random.default_rng(3)
    num_rows = DEVICES * TOKENS * (K if per_choice else 1)
    x = rng.standard_normal((num_rows, DIM)).astype(np.float32)
    y = rng.standard_normal((DEVICES * DEVICES * TOKENS * K, DIM)).astype(np.float32)
    products = np.asarray(on_mesh(run, 3)(x, y, physical)).sum(axis=0)
    # <dispatch x, y> = <x, dispatch' y> = <x, combine y> over all devices; float32 sums
    # of a few hundred.
    np.testing.assert_allclose(products, products[0], rtol=1e-4)
    assert abs(products[0]) > 0.1


def test_equal_choices_of_a_token_fit():
    plan = plan_dispatch(jnp.full((6, 4), 1), 3)
    assert plan.overflow == 0 and plan.group_sizes.tolist() == [0, 24, 0]
    assert len(plan.to_group) == 24
    # Room for less where the caller knows that no token chooses an expert twice.
    assert len(plan_dispatch(jnp.full((6, 4), 1), 3, is_distinct=True).to_group) == 18


@pytest.mark.parametrize("num_rows", [None, 5])
@pytest.mark.parametrize("payload", ["plain", "fp8"])
def test_a_batch_without_tokens(num_rows, payload):
    x = jnp.zeros((0, 128))
    plan = plan_dispatch(jnp.zeros((0, K), jnp.int32), 3, num_rows=num_rows)
    assert plan.overflow == 0 and not plan.tokens_per_physical_expert.any()
    rows = dispatch_tokens(x, plan, payload=payload)
    assert rows.shape == (num_rows or 0, 128) and not rows.any()
    assert combine(rows, plan, 0).shape == x.shape
    assert dispatch_choices(x[:, :1], plan).shape == (num_rows or 0, 1)
    assert combine_choices(rows, plan).shape == x.shape


@pytest.mark.slow
def test_on_gpus_rows_travel_ragged_and_nothing_is_gathered():
    mesh = gpu_mesh("h100", {"ep": 8})
    sizes = jnp.ones((8, 8), jnp.int32)
    offsets = jnp.cumsum(sizes, axis=1) - sizes

    def run(rows):
        segments = Segments(
            send_sizes=sizes, input_offsets=offsets, output_offsets=offsets.T
        )
        return exchange(rows, segments, 8, "ep")

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
    )
    rows = jax.ShapeDtypeStruct(
        (64, 4), jnp.bfloat16, sharding=jax.NamedSharding(mesh, P("ep"))
    )
    program = jax.jit(jax.grad(lambda rows: sharded(rows).astype(jnp.float32).sum()))
    text = program.lower(rows).compile().as_text()
    assert "ragged-all-to-all" in text
    assert "all-gather" not in text


@pytest.mark.parametrize("transport", ["ragged", "gather"])
def test_the_transport_can_be_named(transport):
    def run(rows):
        table = jnp.zeros((DEVICES, DEVICES), jnp.int32)
        return exchange(rows, Segments(table, table, table), 2, "ep", transport)

    sharded = jax.shard_map(
        run, mesh=MESH, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
    )
    text = jax.jit(sharded).lower(jnp.ones((16, 3))).as_text()
    assert ("ragged_all_to_all" in text) == (transport == "ragged")


def test_bad_arguments():
    physical = jnp.zeros((4, 2), jnp.int32)
    plan, x = plan_dispatch(physical, 3), jnp.ones((4, 100))
    for call, message in [
        (
            lambda: plan_dispatch(physical, 9, num_devices=2, axis_name="ep"),
            "num_devices=2 must divide num_physical_experts=9",
        ),
        (
            lambda: plan_dispatch(physical, 8, num_devices=2),
            "num_devices=2 needs axis_name",
        ),
        (
            lambda: plan_dispatch(physical, 8, num_rows=0),
            "num_rows=0 must be at least 1",
        ),
        (
            lambda: dispatch_tokens(x, plan, payload="fp4"),
            "payload='fp4' must be one of plain, fp8",
        ),
        (
            lambda: dispatch_tokens(x, plan, payload="fp8"),
            "do not divide 100 features; use payload=",
        ),
        (
            lambda: exchange(x, None, 2, "ep", "pigeon"),
            "transport='pigeon' must be one of auto, ragged, gather",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
