"""The jitted step: equal to an unpipelined one, laid out over the mesh, and checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dualpipe_jax import PipelineParams
from dualpipe_jax.executor import microbatch_key
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


PADDING = 255


class Special(tiny.Toy):
    """With dropout, weights of targets, and a quantized matrix that stays as it is."""

    def init(self, key):
        params = super().init(key)
        shape = (self.num_stages, self.width, self.width)
        params.stages["quantized"] = jax.random.randint(key, shape, -99, 99, jnp.int8)
        return params

    def stage(self, params, x, key=None):
        if key is not None:
            x = jnp.where(jax.random.bernoulli(key, 0.75, x.shape), x / 0.75, 0)
        return super().stage(params, x) + x @ (params["quantized"].astype("f") / 999)

    def loss(self, params, x, targets, weights=None):
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ params, targets)
        return (losses if weights is None else losses * weights).mean()


class SpecialConfig(tiny.ToyConfig):
    def build(self, schedule, mesh, *, microbatch_size, sequence_length):
        return Special(self.width, schedule.num_stages)


def special_config():
    return dataclasses.replace(
        tiny.config(),
        model=SpecialConfig(4),
        num_microbatches=4,
        sequence_length=8,
        ignore_index=PADDING,
        trainable=PipelineParams(embed=False),
        seed=3,
    )


def special_batch(config):
    """Of which the second half is padding in some microbatches, all in one."""
    inputs, targets = batch_of(config, 0)
    for microbatch, start in enumerate((8, 5, 2, 0)):
        targets[microbatch, :, start:] = PADDING
    return inputs, targets


def test_weights_keys_and_frozen_parameters_are_those_of_the_unpipelined_model():
    config = special_config()
    model = Special(4, 2)
    programs = make_programs(config)
    assert programs.grad_names == ("stages/kernel", "stages/scale", "head")
    inputs, targets = special_batch(config)
    state = programs.init()
    before = jax.tree.map(np.array, state)  # the step reuses the buffers
    held_out = programs.held_out_loss(state, inputs, targets)
    state, metrics = programs.train_step(state, inputs, targets)

    def loss_of(trained, key):
        params = trained.combine(frozen)
        total = 0.0
        for m in range(config.num_microbatches):
            x = params.embed[inputs[m]]
            for stage in range(2):
                own = jax.tree.map(lambda leaf, s=stage: leaf[s], params.stages)
                of = None if key is None else microbatch_key(key, stage, m)
                x = model.stage(own, x, of)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                x @ params.head, targets[m]
            )
            total += jnp.where(targets[m] == PADDING, 0, losses).sum()
        return total / np.float32((targets != PADDING).sum())

    trained, frozen = before.params.partition(
        PipelineParams({"kernel": True, "quantized": False, "scale": True}, False)
    )
    key = jax.random.key(config.seed)
    for number in (2**31, 1, 0):  # apart from parameters, the step, the data shard
        key = jax.random.fold_in(key, number)
    loss, grads = jax.jit(jax.value_and_grad(loss_of))(trained, key)
    # f32: another order of sums.
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    np.testing.assert_allclose(held_out, jax.jit(loss_of)(trained, None), rtol=1e-5)
    # Without optimizer state, and as they were.
    assert state.opt_state[1][0].mu.embed is None
    assert state.opt_state[1][0].mu.stages["quantized"] is None
    new, kept = state.params.partition(PipelineParams(None, False))
    np.testing.assert_array_equal(kept.embed, before.params.embed)
    quantized = before.params.stages["quantized"]
    np.testing.assert_array_equal(new.stages["quantized"], quantized)
    assert np.abs(new.head - before.params.head).max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable": False}, r"trainable=False selects no floating parameter"),
        ({"trainable": {"kernl": True}}, r"trainable.* is not a prefix of the param"),
        (
            {"model": tiny.ToyConfig(4)},
            r"ignore_index=255 needs a model whose loss takes the weights .* Toy.loss",
        ),
    ],
)
def test_what_the_model_has_not_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_programs(dataclasses.replace(special_config(), **change))


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
    with pytest.raises(ValueError, match=r"token -100; tokens are at least 0"):
        programs.check_tokens(np.array([3, -100]))


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
