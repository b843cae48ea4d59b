"""The jitted step: equal to an unpipelined one, laid out over the mesh, and checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dualpipe_jax import PipelineParams
from dualpipe_jax.train import make_programs, step as step_module
from dualpipe_jax.train.config import OptimizerConfig
from tests import reference
from tests.train import tiny


def batch_of(config, step):
    size = (config.num_microbatches, config.microbatch_size, config.sequence_length)
    start = np.random.default_rng(step).integers(0, 64, size[:2])
    windows = (start[..., None] + np.arange(size[2] + 1)) % 64
    return windows[..., :-1].astype(np.int32), windows[..., 1:].astype(np.int32)


def losses_of(config, num_steps=3):
    """Each step's loss and gradient norm, and the last held-out loss."""
    programs = make_programs(config).compile()
    state, record = programs.init(), []
    for step in range(num_steps):
        batch = batch_of(config, step)
        state, metrics = programs.train_step(state, *batch)
        record.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    held_out = programs.held_out_loss(state, *batch_of(config, num_steps))
    return np.array(record), float(held_out)


@pytest.mark.slow
def test_training_is_that_of_the_unpipelined_model(monkeypatch):
    config = dataclasses.replace(tiny.config(), mesh={"pp": 2, "dp": 2})
    pipelined, held_out = losses_of(config)
    monkeypatch.setattr(
        step_module, "pipeline_value_and_grad", reference.reference_value_and_grad
    )
    monkeypatch.setattr(step_module, "pipeline_forward", reference.reference_forward)
    expected, expected_held_out = losses_of(config)
    assert expected[-1, 0] < expected[0, 0] - 0.1  # it learns, so steps matter
    # f32: another order of sums, grown by two steps of Adam.
    np.testing.assert_allclose(pipelined, expected, rtol=1e-4)
    np.testing.assert_allclose(held_out, expected_held_out, rtol=1e-4)


SPOILT = 255  # a token after which no gradient is finite


class Spoilt(tiny.Toy):
    def loss(self, params, x, targets):
        # The derivative of the root at 0 is infinite; times 0 it is NaN.
        root = jnp.sqrt(0 * params.sum() + jnp.all(targets != SPOILT).astype("f"))
        return super().loss(params, x, targets) + root

    def init_buffers(self):
        return jnp.zeros(())

    def observe(self, buffers, aux, step):
        return buffers + 1, {"seen": buffers}


class SpoiltConfig(tiny.ToyConfig):
    def build(self, schedule, mesh, *, microbatch_size, sequence_length):
        return Spoilt(self.width, schedule.num_stages)


def test_a_step_that_is_not_finite_is_skipped_whole():
    config = dataclasses.replace(
        tiny.config(),
        model=SpoiltConfig(4),
        mesh={"pp": 1},
        schedule="1f1b",
        num_microbatches=1,
        max_skipped_steps=1,
    )
    programs = make_programs(config)
    (inputs, targets), after = batch_of(config, 0), batch_of(config, 1)
    targets[0, 0, 0] = SPOILT

    def after_two(*batches):
        state, found = programs.init(), []
        for batch in batches:
            state, metrics = programs.train_step(state, *batch)
            found.append(jax.device_get(metrics))
        return jax.device_get(state), found

    state, (spoilt, last) = after_two((inputs, targets), after)
    assert np.isfinite(spoilt["loss"]) and np.isnan(spoilt["grad_norm"])
    assert (spoilt["skipped"], last["skipped"]) == (1, 0)
    named = dict(zip(programs.grad_names, spoilt["grads_finite"], strict=True))
    assert not named["head"] and last["grads_finite"].all()
    # As if it had not been, but for the number of steps.
    want, (only,) = after_two(after)
    assert (state.step, want.step) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, state[1:], want[1:])
    assert last["learning_rate"] == only["learning_rate"] > 0


def test_stages_and_their_optimizer_state_lie_on_their_ranks():
    state = make_programs(tiny.config()).abstract_state
    adam = state.opt_state[1][0]
    for tree in (state.params, adam.mu, adam.nu):
        specs = [leaf.sharding.spec for leaf in jax.tree.leaves(tree.stages)]
        assert specs == [PartitionSpec("pp")] * len(specs)
        for leaf in jax.tree.leaves((tree.embed, tree.head)):
            assert leaf.sharding.is_fully_replicated
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state.params.stages))


def test_weights_decay_and_scales_do_not():
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5)
    params = PipelineParams(
        stages={"kernel": np.ones((2, 3, 3), "f"), "scale": np.ones((2, 3), "f")},
        embed={"table": np.ones((4, 3), "f")},
        head={"kernel": np.ones((3, 4), "f"), "scale": np.ones(3, "f")},
    )
    optimizer = step_module.make_optimizer(config, num_steps=10)
    zeros = jax.tree.map(np.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):  # as the step does, for optax
        updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for name, leaf in [*updates.stages.items(), *updates.head.items()]:
        assert np.all(np.asarray(leaf) == 0) == (name == "scale"), name
    assert np.all(np.asarray(updates.embed["table"]) < 0)


@pytest.mark.parametrize(
    ("warmup", "num_steps", "step", "expected"),
    [
        (4, 20, 1, 0.25),
        (4, 20, 4, 1.0),
        (4, 20, 12, 0.55),  # half way down a cosine from 1 to 0.1
        (4, 20, 20, 0.1),
        (0, 1, 1, 0.1),
        (10, 5, 5, 0.5),  # a run that ends inside its warm-up
    ],
)
def test_learning_rate(warmup, num_steps, step, expected):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=warmup)
    with jax.numpy_dtype_promotion("standard"):  # optax's floats and int counts
        rate = step_module.learning_rate(config, num_steps)(step)
    np.testing.assert_allclose(rate, 2 * expected, rtol=1e-6)


def test_the_first_step_moves_the_parameters():
    config = dataclasses.replace(tiny.config().optimizer, warmup_steps=10)
    params = PipelineParams(stages={"w": np.ones((2, 3, 3), "f")})
    optimizer = step_module.make_optimizer(config, num_steps=20)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert float(optax.tree.norm(updates)) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mesh": {"pp": 2, "dp": 2, "ep": 4}, "microbatch_size": 8},
            r"needs 16 devices, but jax has 8 \(cpu\); use",
        ),
        ({"mesh": {"pp": 3}}, r"num_ranks=3 must be even"),
        ({"num_microbatches": 2}, r"num_microbatches=2 must be even and >= 2\*"),
    ],
)
def test_what_does_not_fit_is_refused_before_compiling(change, message):
    with pytest.raises(ValueError, match=message):
        make_programs(dataclasses.replace(tiny.config(), **change))


def test_tokens_outside_the_vocabulary_are_refused():
    programs = make_programs(tiny.config())
    programs.check_tokens(np.array([0, 255]))
    with pytest.raises(
        ValueError, match=r"token 256, but the model's vocab_size is 256"
    ):
        programs.check_tokens(np.array([3, 256]))


def test_the_mean_of_gradients_can_be_kept_in_bfloat16():
    params = PipelineParams(stages={"kernel": jnp.ones((2, 3, 3))})
    grads = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    results = []
    for dtype in ("float32", "bfloat16"):
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, mean_dtype=dtype)
        optimizer = step_module.make_optimizer(config, num_steps=4)
        state = optimizer.init(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        adam = state[1][0]
        assert adam.mu.stages["kernel"].dtype == dtype
        assert adam.nu.stages["kernel"].dtype == jnp.float32
        results.append(updates.stages["kernel"])
    # The first update is a quotient of means that rounds once to 8 bits.
    np.testing.assert_allclose(*results, rtol=2**-8)


def test_an_unknown_dtype_of_the_mean_is_refused():
    with pytest.raises(ValueError, match="mean_dtype='float8' must be"):
        OptimizerConfig(learning_rate=1.0, warmup_steps=0, mean_dtype="float8")
