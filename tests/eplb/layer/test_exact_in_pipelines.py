"""Exact balance in the stages of pipelines: losses are those of the run without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dualpipe_jax import (
    PipelineParams,
    dualpipe,
    dualpipev,
    gpipe,
    one_f_one_b,
    pipeline_value_and_grad,
    stack_stages,
    zb1p,
)
from eplb_jax import ExpertParallel, ExpertWeights
from eplb_jax.layer.mixture import mix

RANKS, DEVICES, STEPS, COUNT = 2, 4, 20, 4
DIM, HIDDEN, EXPERTS, TOP_K, TOKENS = 8, 8, 8, 2, 8
SCHEDULES = {
    "dualpipe": dualpipe(RANKS, COUNT),
    "dualpipev": dualpipev(RANKS, COUNT),
    "one_f_one_b": one_f_one_b(RANKS, COUNT),
    "zb1p": zb1p(RANKS, COUNT),
    "gpipe": gpipe(RANKS, COUNT),
}


def normal(key, *shape):
    return jax.random.normal(key, shape) / shape[-2] ** 0.5


def make_layer(key):
    keys = iter(jax.random.split(key, 8))
    into, out = (EXPERTS, DIM, HIDDEN), (EXPERTS, HIDDEN, DIM)
    return {
        "router": normal(next(keys), DIM, EXPERTS),
        "experts": ExpertWeights(*(normal(next(keys), *s) for s in (into, into, out))),
        "shared": ExpertWeights(
            *(normal(next(keys), 1, *s[1:]) for s in (into, into, out))
        ),
    }


def make_params(num_stages):
    """One layer in each stage."""
    keys = jax.random.split(jax.random.key(0), num_stages)
    stages = list(map(make_layer, keys))
    return PipelineParams(embed=None, stages=stack_stages(stages), head=jnp.eye(DIM))


def stage_with(parallel):
    def stage_fn(layer, x):
        """[sequences, tokens, DIM]; each microbatch has hot experts of its own."""
        tokens = jnp.tanh(x.reshape(-1, DIM))
        hot = jnp.cos(jnp.arange(EXPERTS, dtype=x.dtype))[None]
        logits = tokens @ layer["router"] + 2 * tokens.mean() * hot
        scores, experts = jax.lax.top_k(jax.nn.softmax(logits), TOP_K)
        mixed = mix(
            tokens,
            experts,
            scores,
            layer["experts"],
            None,
            parallel,
            is_distinct=True,
            shared=layer["shared"] if parallel.spread_shared else None,
        )
        y = mixed.outputs
        if not parallel.spread_shared:
            gate, up, down = (leaf[0] for leaf in layer["shared"])
            y += (jax.nn.silu(tokens @ gate) * (tokens @ up)) @ down
        return x + 0.5 * y.reshape(x.shape), mixed.num_fetched

    return stage_fn


@functools.cache
def batches():
    rng = np.random.default_rng(0)
    shape = (STEPS, COUNT, DEVICES, TOKENS, DIM)
    inputs = rng.standard_normal(shape) + rng.standard_normal((STEPS, COUNT, 1, 1, 1))
    targets = rng.standard_normal(shape)
    return inputs.astype(np.float32), targets.astype(np.float32)


def train(schedule, parallel, overlap=None):
    """Losses of plain gradient descent, and experts fetched in all steps."""
    experts = ExpertWeights(*[P("ep")] * 3)
    mesh = jax.make_mesh((schedule.num_ranks, DEVICES), ("pp", "ep"))
    step = pipeline_value_and_grad(
        stage_with(parallel),
        lambda head, y, targets: ((y @ head - targets) ** 2).mean(),
        schedule=schedule,
        mesh=mesh,
        data_axes=("ep",),
        param_specs=PipelineParams(
            stages={"router": P(), "experts": experts, "shared": P()}, head=P()
        ),
        overlap=overlap,
    )
    params, losses, fetched = make_params(schedule.num_stages), [], 0
    for inputs, targets in zip(*batches(), strict=True):
        (loss, aux), grads = step(params, inputs, targets)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        losses.append(loss.mean())
        fetched += aux.sum()
    return np.array(losses), int(fetched)


@functools.cache
def without(num_stages):
    schedule = SCHEDULES["gpipe" if num_stages == RANKS else "dualpipev"]
    return train(schedule, ExpertParallel("ep", DEVICES))[0]


@pytest.mark.slow
# Each compiles for half a minute; tests/deepseek/model/test_training.py has DualPipe.
@pytest.mark.parametrize("name", ["zb1p"])
def test_losses_are_those_of_the_run_without(name):
    parallel = ExpertParallel(
        "ep",
        DEVICES,
        balance="exact",
        num_fetched=EXPERTS - EXPERTS // DEVICES,
        spread_shared=name == "zb1p",
    )
    losses, fetched = train(SCHEDULES[name], parallel, name == "dualpipe" or None)
    assert np.isfinite(losses).all() and np.ptp(losses) > 0.1 and fetched > 0
    np.testing.assert_allclose(losses, without(SCHEDULES[name].num_stages), rtol=1e-4)
