"""The transformer as stages: the same model over any number of them, and causal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax.train import model

MODEL = model.Transformer(width=16, hidden=24, num_heads=2, num_layers=4)


def apply(fns, params, tokens):
    """What the last stage gives, with no pipeline."""
    stages, embed, _ = params
    x = fns.embed_fn(embed, tokens)
    for stage in stages:
        x = fns.stage_fn(stage, x)
    return x


def test_any_number_of_stages_is_the_same_model():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)), jnp.int32)
    four, one = MODEL.build(4), MODEL.build(1)
    stages, embed, head = four.init(jax.random.key(0))
    # One stage of four layers, out of four stages of one.
    joined = one.init(jax.random.key(1))[0][0]
    for i, stage in enumerate(stages):
        joined["layers"][i] = stage["layers"][0]
    y4 = apply(four, (stages, embed, head), tokens)
    y1 = apply(one, ([joined], embed, head), tokens)
    np.testing.assert_array_equal(y4, y1)


def test_stages_differ_and_depend_on_the_key():
    stages, _, _ = MODEL.build(2).init(jax.random.key(0))
    again, _, _ = MODEL.build(2).init(jax.random.key(0))
    other, _, _ = MODEL.build(2).init(jax.random.key(1))
    assert jax.tree.structure(stages[0]) == jax.tree.structure(stages[1])
    first = [jax.tree.leaves(s[0])[0] for s in (stages, again, other)]
    np.testing.assert_array_equal(first[0], first[1])
    assert not np.allclose(first[0], first[2])
    assert not np.allclose(first[0], jax.tree.leaves(stages[1])[0])


def test_the_past_does_not_see_the_future():
    fns = MODEL.build(2)
    params = fns.init(jax.random.key(0))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    y = apply(fns, params, tokens)
    changed = apply(fns, params, tokens.at[0, 7].set(200))
    np.testing.assert_array_equal(y[:, :7], changed[:, :7])
    assert (jnp.abs(y - changed)[:, 7:].max(axis=-1) > 0).all()


def test_an_untrained_model_is_near_the_uniform_loss():
    fns = MODEL.build(1)
    (stage,), embed, head = fns.init(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 64)), jnp.int32)
    y = apply(fns, ([stage], embed, head), tokens)
    loss = fns.loss_fn(head, y, jnp.roll(tokens, -1, axis=1))
    # Logits of unit variance cost about half a nat over log(256).
    np.testing.assert_allclose(loss, np.log(256) + 0.5, atol=0.3)


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
