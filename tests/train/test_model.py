"""The transformer as stages: the same model over any number of them, and causal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax.train import model

MODEL = model.Transformer(width=16, hidden=24, num_heads=2, num_layers=2)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 64)), jnp.int32)


@pytest.fixture(scope="module")
def two():
    """The model over two stages: its functions and its parameters."""
    fns = MODEL.build(2)
    return fns, fns.init(jax.random.key(0))


def apply(fns, params, tokens):
    """What the last stage gives, with no pipeline."""
    x = fns.embed_fn(params.embed, tokens)
    for stage in range(jax.tree.leaves(params.stages)[0].shape[0]):
        x = fns.stage_fn(jax.tree.map(lambda leaf, s=stage: leaf[s], params.stages), x)
    return x


@pytest.mark.slow
def test_any_number_of_stages_is_the_same_model(two):
    fns, params = two
    one = MODEL.build(1)
    # One stage of two layers, out of two stages of one.
    joined = jax.eval_shape(one.init, jax.random.key(0))
    for i in range(2):
        joined.stages["layers"][i] = jax.tree.map(
            lambda leaf, i=i: leaf[i : i + 1], params.stages["layers"][0]
        )
    joined = dataclasses.replace(joined, embed=params.embed)
    np.testing.assert_array_equal(
        apply(fns, params, TOKENS), apply(one, joined, TOKENS)
    )


def test_stages_differ_and_depend_on_the_key(two):
    fns, params = two
    kernel, again, other = (
        p.stages["layers"][0]["attention"]["qkv"]["kernel"][...]
        for p in (params, *(fns.init(jax.random.key(seed)) for seed in (0, 1)))
    )
    np.testing.assert_array_equal(kernel, again)
    assert not np.allclose(kernel, other)
    assert not np.allclose(kernel[0], kernel[1])


def test_the_past_does_not_see_the_future(two):
    y = apply(*two, TOKENS)
    changed = apply(*two, TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 256))
    np.testing.assert_array_equal(y[:, :7], changed[:, :7])
    assert (jnp.abs(y - changed)[:, 7:].max(axis=-1) > 0).all()


def test_an_untrained_model_is_near_the_uniform_loss(two):
    fns, params = two
    y = apply(fns, params, TOKENS)
    loss = fns.loss_fn(params.head, y, jnp.roll(TOKENS, -1, axis=1))
    # Logits of variance 1/4 cost about half of that over log(256).
    np.testing.assert_allclose(loss, np.log(256) + 0.125, atol=0.1)


def test_rotation_keeps_lengths_and_sees_distances_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    q, k = (jnp.broadcast_to(a, (1, 20, 1, 8)) for a in (q, k))
    rq, rk = model.rotate(q), model.rotate(k)
    norm = jnp.linalg.norm
    # f32: a few ulp of sums over 8 numbers of order one.
    np.testing.assert_allclose(norm(rq, axis=-1), norm(q, axis=-1), rtol=1e-5)
    scores = jnp.einsum("bqhk,bshk->qs", rq, rk)
    for distance in (0, 3, 11):
        diagonal = jnp.diagonal(scores, distance)
        np.testing.assert_allclose(
            diagonal, diagonal[:1].repeat(20 - distance), atol=1e-5
        )
    assert abs(scores[0, 0] - scores[0, 3]) > 1e-2


@pytest.mark.parametrize(
    ("kwargs", "num_stages", "message"),
    [
        ({}, 3, r"num_layers=4 must be a positive multiple of num_stages=3; change"),
        ({"num_layers": 0}, 2, r"num_layers=0 must be a positive multiple"),
        ({"width": 18}, 2, r"width=18 must be divisible by 2 \* self.num_heads=2"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(kwargs, num_stages, message):
    sizes = {"width": 16, "hidden": 24, "num_heads": 2, "num_layers": 4} | kwargs
    with pytest.raises(ValueError, match=message):
        model.Transformer(**sizes).build(num_stages)
