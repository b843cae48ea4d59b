"""Rebalancing inside a jitted step: what moves, when and how far."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from eplb_jax import balancedness, physical_weights, rebalance_experts
from eplb_jax.placement.load import sum_of_last
from eplb_jax.placement.quality import count_moves
from eplb_jax.placement.tables import ExpertTables
from eplb_jax.serving.balancer import ExpertBalancer

LAYERS, EXPERTS, PHYSICAL, DEVICES = 3, 12, 16, 4
RECORDED = Path(__file__).parents[2] / "data" / "eplb_loads_deepseek_v3.npz"


def make(**changes):
    fields = {
        "num_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_physical_experts": PHYSICAL,
        "num_devices": DEVICES,
        "estimator": sum_of_last(4),
    }
    return ExpertBalancer(**fields | changes)


def draw(rng, popularity, num_choices=20_000):
    """Counts [layers, experts] of a step, drawn by the popularity of the experts."""
    popularity = np.asarray(popularity, np.float64)
    shares = popularity / popularity.sum(-1, keepdims=True)
    return np.stack([rng.multinomial(num_choices, row) for row in shares])


def follow(balancer):
    """One jitted step that observes, plans and switches; it must compile only once."""

    @jax.jit
    def step(state, counts):
        state = balancer.observe(state, counts)
        plan = balancer.plan(state)
        return balancer.switch(state, plan), plan

    return step


@pytest.mark.slow
def test_a_steady_load_causes_no_moves_once_it_is_balanced():
    rng = np.random.default_rng(0)
    popularity = rng.lognormal(sigma=0.7, size=(LAYERS, EXPERTS))
    balancer = make(below=0.97)
    step, state = follow(balancer), balancer.init()
    moves = []
    for _ in range(60):
        state, plan = step(state, draw(rng, popularity))
        moves.append(int(plan.num_moves.sum()))
    assert sum(moves[:20]) > 0 and sum(moves[20:]) == 0
    assert int(state.num_moves) == sum(moves)
    assert step._cache_size() == 1
    scores = balancer.metrics(state)
    assert scores["balancedness_worst"] > 0.9 and scores["num_refused"] == 0


@pytest.mark.parametrize("layers_per_plan", [1, None])
def test_a_plan_stays_within_its_budget_and_every_layer_has_its_turn(layers_per_plan):
    rng = np.random.default_rng(1)
    popularity = rng.lognormal(sigma=1.0, size=(LAYERS, EXPERTS))
    balancer = make(layers_per_plan=layers_per_plan, max_moves=2, below=1, min_gain=0)
    step, state = follow(balancer), balancer.init()
    changed = set()
    for _ in range(3 * LAYERS):
        before = state.tables.physical_to_logical_map
        state, plan = step(state, draw(rng, popularity))
        differs_L = np.asarray(before != state.tables.physical_to_logical_map).sum(1)
        assert differs_L.max() <= 2
        assert (differs_L > 0).sum() <= (layers_per_plan or LAYERS)
        layers_N = np.asarray(plan.layers)
        assert len(set(layers_N.tolist())) == len(layers_N)
        np.testing.assert_array_equal(differs_L[layers_N] > 0, plan.is_changed)
        changed.update(np.flatnonzero(differs_L).tolist())
        state.tables.validate()
    assert changed == set(range(LAYERS))


def test_plans_come_every_so_many_steps():
    rng = np.random.default_rng(2)
    balancer = make(every=5, below=1, min_gain=0, min_gain_per_move=0)
    step, state = follow(balancer), balancer.init()
    for number in range(1, 16):
        # Another load each time, so that there is always something to gain.
        counts = draw(rng, rng.lognormal(sigma=1.5, size=(LAYERS, EXPERTS)))
        state, plan = step(state, counts)
        assert bool(plan.is_changed.any()) == (number % 5 == 0)


@pytest.mark.slow
def test_a_gain_must_be_worth_it():
    rng = np.random.default_rng(3)
    counts = draw(rng, rng.lognormal(sigma=1.0, size=(LAYERS, EXPERTS)))
    balancer = make(min_gain=0.9)
    state, plan = follow(balancer)(balancer.init(), counts)
    metrics = balancer.metrics(state)
    assert metrics["balancedness"] < 0.8
    assert not plan.is_changed.any()
    assert metrics["num_rejected"] == LAYERS and metrics["num_refused"] == 0


@pytest.mark.slow
def test_recorded_loads_that_change_are_followed():
    """Eight recorded windows, 15 steps each: 0.95 of fresh plans, a fifth of moves."""
    with np.load(RECORDED) as file:
        windows = [file[name][3:9] for name in sorted(file)]
    num_physical, devices = 288, 32
    balancer = ExpertBalancer(
        num_layers=6,
        num_experts=256,
        num_physical_experts=num_physical,
        num_devices=devices,
        estimator=sum_of_last(4),
    )
    step, state = follow(balancer), balancer.init()
    rng = np.random.default_rng(0)
    fresh = state.tables.physical_to_logical_map
    ours, theirs, fresh_moves = [], [], 0
    for window in windows:
        for _ in range(15):
            counts = draw(rng, window, num_choices=200_000)
            # Both have seen the step before and run this one.
            ours.append(
                balancedness(counts, state.tables.physical_to_logical_map, devices)
            )
            theirs.append(balancedness(counts, fresh, devices))
            state, _ = step(state, counts)
            old, fresh = (
                fresh,
                rebalance_experts(
                    counts, num_physical, 1, 1, devices
                ).physical_to_logical_map,
            )
            fresh_moves += int(count_moves(old, fresh, devices).sum())
    assert np.mean(ours) >= 0.95 * np.mean(theirs)
    assert int(state.num_moves) <= 0.2 * fresh_moves
    assert step._cache_size() == 1


@pytest.mark.slow
def test_a_device_without_capacity_is_vacated_and_no_expert_is_lost():
    rng = np.random.default_rng(4)
    popularity = rng.lognormal(sigma=0.7, size=(LAYERS, EXPERTS))
    balancer = make(layers_per_plan=1, every=7)
    step, state = follow(balancer), balancer.init()
    for _ in range(3):
        state, _ = step(state, draw(rng, popularity))
    state = balancer.with_capacity(state, [1.0, 1.0, 0.0, 1.0])
    assert balancer.metrics(state)["num_stranded"] == LAYERS
    for left in range(LAYERS - 1, -1, -1):
        state, _ = step(state, draw(rng, popularity))
        state.tables.validate()  # every expert has a replica, at every step
        assert balancer.metrics(state)["num_stranded"] == left
    placement = np.asarray(state.tables.physical_to_logical_map)
    assert (placement.reshape(LAYERS, DEVICES, -1)[:, 2] == -1).all()
    # With capacity again, it gets experts as soon as that is worth it.
    state = balancer.with_capacity(state, np.ones(DEVICES))
    for _ in range(30):
        state, _ = step(state, draw(rng, popularity))
    placement = np.asarray(state.tables.physical_to_logical_map)
    assert (placement.reshape(LAYERS, DEVICES, -1)[:, 2] >= 0).any(axis=1).all()


def on_devices(function, in_specs, out_specs, **options):
    mesh = jax.make_mesh((DEVICES,), ("ep",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        ),
        **options,
    )


@pytest.mark.slow
def test_weights_match_the_tables_at_every_step():
    rng = np.random.default_rng(5)
    logical = rng.standard_normal((LAYERS, EXPERTS, 5, 3)).astype(np.float32)
    balancer = make(layers_per_plan=2, max_moves=4)

    def start(logical):
        tables = balancer.init().tables
        return [
            physical_weights(
                logical[layer],
                tables.layer(layer),
                num_devices=DEVICES,
                axis_name="ep",
            )
            for layer in range(LAYERS)
        ]

    def step(weights, state, counts):
        return balancer.update(weights, state, counts, axis_name="ep")

    step = on_devices(
        step,
        (P("ep"), P(), P()),
        (P("ep"), P(), P()),
        donate_argnums=(0, 1),
    )
    weights = on_devices(start, P(None, "ep"), P("ep"))(logical)
    everywhere = NamedSharding(weights[0].sharding.mesh, P())
    state, changes = jax.device_put(balancer.init(), everywhere), 0
    for number in range(24):
        if number % 8 == 0:  # the hot experts change
            popularity = rng.lognormal(sigma=1.2, size=(LAYERS, EXPERTS))
        if number == 12:
            state = balancer.with_capacity(state, [1.0, 0.0, 0.5, 1.0])
        weights, state, plan = step(weights, state, draw(rng, popularity))
        changes += int(plan.is_changed.sum())
        placement = np.asarray(state.tables.physical_to_logical_map)
        expected = np.stack([logical[i][placement[i]] for i in range(LAYERS)])
        expected[placement < 0] = 0
        np.testing.assert_array_equal(weights, expected)
    assert changes > LAYERS
    assert step._cache_size() == 1


@pytest.mark.slow
def test_devices_that_disagree_keep_what_they_have():
    rng = np.random.default_rng(6)
    counts = draw(rng, rng.lognormal(sigma=1.2, size=(LAYERS, EXPERTS)))
    balancer = make()

    def step(state, counts, wrong):
        # What a device with broken arithmetic has seen.
        counts = jnp.where(jax.lax.axis_index("ep") == wrong, counts[:, ::-1], counts)
        state = balancer.observe(state, counts)
        plan = balancer.agree(balancer.plan(state), "ep")
        state = balancer.switch(state, plan)
        return jax.tree.map(lambda leaf: leaf[None], (state.tables, state.num_refused))

    step = on_devices(step, (P(), P(), P()), P("ep"))
    before = balancer.init().tables
    for wrong, refused in ((-1, 0), (2, 1)):
        tables, num_refused = step(balancer.init(), counts, wrong)
        assert (np.asarray(num_refused) == refused).all()
        for device in range(DEVICES):
            own = jax.tree.map(lambda leaf, device=device: leaf[device], tables)
            same = np.array_equal(
                own.physical_to_logical_map, before.physical_to_logical_map
            )
            assert same == bool(refused)
            own.validate()


def test_a_state_is_a_pytree_of_arrays():
    state = make().init()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert isinstance(state.tables, ExpertTables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_physical_experts": 17},
            r"num_physical_experts=17 must be a multiple of .*num_devices=4",
        ),
        ({"num_physical_experts": 8}, r"at least .*num_experts=12"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"every": 2.5}, "every=2.5 must be at least 1, an int"),
        ({"num_layers": 3.0}, "num_layers=3.0 must be at least 1, an int"),
        ({"max_moves": 2.0}, "max_moves=2.0 must be at least 1, an int"),
        ({"max_replicas": 0}, "max_replicas=0 must be at least 1"),
        ({"min_gain": float("nan")}, r"min_gain=nan must be in \[0, 1\]"),
        (
            {"min_gain_per_move": float("nan")},
            r"min_gain_per_move=nan must be in \[0, 1\]",
        ),
        ({"layers_per_plan": 4}, "between 1 and .*num_layers=3"),
        ({"max_moves": 0}, "a swap of two experts is 2"),
        ({"below": 1.5}, r"below=1.5 must be in \[0, 1\]"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_what_does_not_fit_the_balancer():
    balancer = make()
    state = balancer.init()
    with pytest.raises(
        ValueError, match=r"= \[3, 16\]; pass a placement of this model"
    ):
        balancer.init(np.zeros((LAYERS, PHYSICAL + 4), np.int32))
    with pytest.raises(ValueError, match="Expert 1 of layer 0 has no replica"):
        balancer.init(np.zeros((LAYERS, PHYSICAL), np.int32))
    with pytest.raises(ValueError, match=r"float64.* but experts are integers"):
        balancer.init(np.zeros((LAYERS, PHYSICAL)))
    with pytest.raises(ValueError, match=r"counts has shape \(3, 11\)"):
        balancer.observe(state, jnp.zeros((LAYERS, 11)))
    with pytest.raises(ValueError, match="leaves 2 of 4 devices alive"):
        balancer.with_capacity(state, [1, 0, 0, 1])
    with pytest.raises(ValueError, match="must be finite and not negative"):
        balancer.with_capacity(state, [1, 1, -1, 1])
