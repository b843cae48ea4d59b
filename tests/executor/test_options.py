"""Loss weights, side inputs, frozen parameters, keys and gradients of inputs at once.

One program of each kind runs with all of them, against the same functions without a
pipeline.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dualpipe_jax import PipelineParams, Weighted, dualpipe, pipeline_value_and_grad
from dualpipe_jax.executor import microbatch_key
from tests.executor.toy import assert_grads_close, make_mesh

SCHEDULE = dualpipe(2, 4)
WIDTH, MICROBATCH, DEVICES = 4, 6, 2
ROWS = MICROBATCH // DEVICES
TRAINABLE = PipelineParams(
    stages={"base": False, "lora": True}, embed={"scale": True, "shift": False}
)


def embed_fn(params, inputs, *, key):
    noise = 0.1 * jax.random.normal(key, inputs["x"].shape)
    scale = params["scale"][inputs["kind"]]
    return inputs["x"] * scale[:, None] + params["shift"] + noise


def stage_fn(params, x, side, *, key):
    keep = jax.random.bernoulli(key, 0.8, x.shape) & side["mask"][:, None]
    w = params["base"] + params["lora"]["a"] @ params["lora"]["b"]
    y = jnp.sin(x @ w + side["position"].astype(x.dtype)[:, None])
    return x + jnp.where(keep, y * side["gain"], 0.0)


def loss_fn(head, y, targets, *, key):
    noise = 0.1 * jax.random.normal(key, y.shape)
    valid = targets >= 0
    errors = ((y @ head + noise) - targets[:, None].astype(y.dtype)) ** 2
    total = jnp.where(valid, errors.sum(-1), 0.0).sum()
    return Weighted(total, valid.sum()), {"valid": valid.sum()}


def make_arguments():
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape):
        return 0.5 * jax.random.normal(next(keys), shape)

    num, stages = SCHEDULE.num_microbatches, SCHEDULE.num_stages
    lora = {"a": normal(stages, WIDTH, 1), "b": normal(stages, 1, WIDTH)}
    params = PipelineParams(
        {"base": normal(stages, WIDTH, WIDTH), "lora": lora},
        {"scale": normal(3), "shift": normal()},
        normal(WIDTH, WIDTH),
    )
    rng = np.random.default_rng(0)
    inputs = {
        "x": normal(num, MICROBATCH, WIDTH),
        "kind": jnp.asarray(rng.integers(0, 3, (num, MICROBATCH)), jnp.int32),
    }
    # A third has no target: one microbatch has none at all, another none on a device.
    targets = rng.integers(-1, 3, (num, MICROBATCH)).astype(np.int32)
    targets[1], targets[2, :ROWS] = -1, -1
    side = {
        "position": jnp.asarray(rng.integers(0, 9, (num, MICROBATCH)), jnp.int32),
        "mask": jnp.asarray(rng.random((num, MICROBATCH)) < 0.7),
        "gain": normal(num),
    }
    return params, inputs, jnp.asarray(targets), jax.random.key(5), side


@functools.cache
def make_step(overlap=None):
    return pipeline_value_and_grad(
        stage_fn,
        loss_fn,
        schedule=SCHEDULE,
        mesh=make_mesh(pp=2, dp=DEVICES),
        embed_fn=embed_fn,
        data_axes=("dp",),
        overlap=overlap,
        side={"position": P(None, "dp"), "mask": P(None, "dp"), "gain": P()},
        trainable=TRAINABLE,
        input_grads=True,
    )


def reference(params, x, inputs, targets, key, side):
    """Returns the loss, and each microbatch's share of it; loops over stages."""
    num_stages = SCHEDULE.num_stages

    def divide(leaf):
        return leaf.reshape(len(leaf), DEVICES, ROWS, *leaf.shape[2:])

    def one(m, device, row, targets, side):
        def key_of(stage):
            return microbatch_key(jax.random.fold_in(key, device), stage, m)

        y = embed_fn(params.embed, row, key=key_of(num_stages))
        for s in range(num_stages):
            own = jax.tree.map(lambda leaf: leaf[s], params.stages)  # noqa: B023
            y = stage_fn(own, y, side, key=key_of(s))
        return loss_fn(params.head, y, targets, key=key_of(num_stages + 1))[0]

    over_devices = jax.vmap(
        one, (None, 0, 0, 0, {**dict.fromkeys(side, 0), "gain": None})
    )
    by_device = {name: divide(side[name]) for name in ("position", "mask")}
    sums = jax.vmap(over_devices, (0, None, 0, 0, 0))(
        jnp.arange(SCHEDULE.num_microbatches),
        jnp.arange(DEVICES),
        jax.tree.map(divide, {**inputs, "x": x}),
        divide(targets),
        {**by_device, "gain": side["gain"]},
    )
    weight = sums.weight.sum().astype(jnp.float32)
    share = sums.total.sum(1) * SCHEDULE.num_microbatches / weight
    return share.mean(), share


@functools.cache
def expected():
    params, inputs, *rest = make_arguments()
    run = jax.jit(jax.value_and_grad(reference, argnums=(0, 1), has_aux=True))
    return run(params, inputs["x"], inputs, *rest)


@pytest.mark.parametrize("overlap", [False, True], ids=["compact", "overlapped"])
def test_all_options_at_once(overlap):
    params, inputs, targets, key, side = make_arguments()
    step = make_step(overlap)
    (losses, aux), (grads, input_grads) = step(
        params, inputs, targets, key=key, side=side
    )
    (_, want_losses), (want, want_inputs) = expected()

    assert_grads_close(losses, want_losses)
    assert_grads_close(input_grads["x"], want_inputs)
    assert input_grads["kind"] is None
    assert_grads_close(grads, want.partition(TRAINABLE)[0])
    assert aux["valid"] == (targets >= 0).sum()

    # Nothing to learn: zeros, from the same program.
    (losses, _), gradients = step(
        params, inputs, jnp.full_like(targets, -1), key=key, side=side
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((losses, gradients)))
