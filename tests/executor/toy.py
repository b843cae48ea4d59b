"""A toy model for the executor's tests: embedding, residual blocks, a linear head."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from dualpipe_jax import (
    dualpipe,
    dualpipev,
    gpipe,
    interleaved_1f1b,
    interleaved_zero_bubble,
    looped_bfs,
    one_f_one_b,
    v_half,
    v_min,
    zb1p,
    zbv,
)
from dualpipe_jax.executor.pipeline import PipelineParams, stack_stages

SCHEDULES = {
    "dualpipe": dualpipe(4, 8),
    "dualpipev": dualpipev(2, 6),
    "one_f_one_b": one_f_one_b(4, 5),
    "zb1p": zb1p(4, 6),
    "gpipe": gpipe(4, 6),
}
SEVERAL_STAGES = {
    "zbv": zbv(2, 4),
    "v_half": v_half(4, 4),
    "v_min": v_min(3, 4),
    "interleaved_1f1b": interleaved_1f1b(2, 4),
    "interleaved_zero_bubble": interleaved_zero_bubble(2, 4, stages_per_rank=3),
    "looped_bfs": looped_bfs(2, 3),
}
WIDTH, VOCABULARY, MICROBATCH, LENGTH = 16, 11, 4, 6


def make_mesh(**axes):
    size = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:size],
    )


def stage_fn(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def embed_fn(params, tokens):
    return params[tokens]


def cross_entropy(logits, targets):
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_probs, targets[..., None], -1))


def loss_fn(params, y, targets):
    return cross_entropy(y @ params, targets)


def make_params(num_stages, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_stages + 2)

    def normal(key, *shape):
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.3, dtype)

    stages = [
        {"up": normal(key, WIDTH, 2 * WIDTH), "down": normal(key, 2 * WIDTH, WIDTH)}
        for key in keys[:num_stages]
    ]
    return PipelineParams(
        stack_stages(stages),
        normal(keys[-2], VOCABULARY, WIDTH),
        normal(keys[-1], WIDTH, VOCABULARY),
    )


def make_batch(num_microbatches, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_microbatches, MICROBATCH, LENGTH)
    tokens, targets = rng.integers(0, VOCABULARY, (2, *shape)).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(targets)


def assert_grads_close(actual, expected, rtol=1e-5):
    """Within `rtol` of each leaf's largest entry: f32 sums in another order."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            a, e, rtol=0, atol=rtol * np.abs(e).max()
        ),
        actual,
        expected,
    )
