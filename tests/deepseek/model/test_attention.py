"""Latent attention against the report's equations, in NumPy and float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dualpipe_jax.deepseek.model.attention import LatentAttention, attend
from dualpipe_jax.deepseek.model.rope import rotate
from tests.deepseek.model.sizes import small

# Sums of tens of float32 products against float64.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
BASE = 100.0  # so that the slowest pair turns too within a few positions


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def turned(x, position, base):
    """A [..., R] vector, its neighbours as complex numbers, each turned by its own."""
    z = x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2]
    width = x.shape[-1]
    z = z * np.exp(1j * position * base ** (-np.arange(0, width, 2) / width))
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def softmax_attention(q, k, v):
    """Position by position, head by head."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(q.shape[:3]):
        scores = [
            q[b, t, h] @ k[b, s, h] / math.sqrt(q.shape[-1]) for s in range(t + 1)
        ]
        weights = np.exp(np.array(scores) - max(scores))
        for s, weight in enumerate(weights / weights.sum()):
            out[b, t, h] += weight * v[b, s, h]
    return out


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def latent_attention(c, weights, h):
    """Equations 1 to 11 of arXiv:2412.19437, its names for all.

    The RMS norms behind both compressions are from section 4.2. The published weights
    hold W^DKV with W^KR, W^UQ with W^QR and W^UK with W^UV as one matrix, and so do
    ours: for each head the part without a position comes first.
    """
    W_DKV, W_KR = np.split(weights["kv_down"]["kernel"], [c.kv_lora_rank], axis=1)
    W_UK, W_UV = np.split(weights["kv_up"]["kernel"], [c.qk_nope_head_dim], axis=2)
    W_UQ, W_QR = np.split(weights["q_up"]["kernel"], [c.qk_nope_head_dim], axis=2)
    W_O = weights["out"]["kernel"]
    u = np.zeros(h.shape)
    for b, sequence in enumerate(h.astype(np.float64)):
        q, k, v = [], [], []
        for t, h_t in enumerate(sequence):
            c_KV = rms_norm(h_t @ W_DKV, weights["kv_norm"]["scale"], c.rms_norm_eps)
            k_R = turned(h_t @ W_KR, t, c.rope_theta)
            c_Q = h_t
            if c.q_lora_rank is not None:
                c_Q = h_t @ weights["q_down"]["kernel"]
                c_Q = rms_norm(c_Q, weights["q_norm"]["scale"], c.rms_norm_eps)
            for i in range(c.num_attention_heads):
                q_R = turned(c_Q @ W_QR[:, i], t, c.rope_theta)
                q.append(np.concatenate([c_Q @ W_UQ[:, i], q_R]))
                k.append(np.concatenate([c_KV @ W_UK[:, i], k_R]))
                v.append(c_KV @ W_UV[:, i])
        shape = (1, len(sequence), c.num_attention_heads, -1)
        o = softmax_attention(*(np.array(part).reshape(shape) for part in (q, k, v)))
        for t, i in np.ndindex(o.shape[1:3]):
            u[b, t] += o[0, t, i] @ W_O[i]
    return u


def make(config):
    """A function (x, weights) of the module, and weights for it."""
    module = nnx.eval_shape(lambda: LatentAttention(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    leaves = [normal(seed, *leaf.shape) / 2 for seed, leaf in enumerate(leaves)]
    state = jax.tree.unflatten(tree, leaves)
    weights = jax.tree.map(lambda leaf: leaf.astype(np.float64), state)

    def call(method, x, *arguments, state=state):
        return getattr(nnx.merge(graph, state), method)(x, *arguments)

    return jax.jit(call, static_argnums=0), nnx.to_pure_dict(weights)


@pytest.mark.parametrize("width", [2, 4, 6])
def test_rotary_positions_are_complex_turns(width):
    x = normal(0, 2, 5, 3, width)
    positions = np.array([[0, 1, 2, 3, 4], [7, 1, 100, 5, 0]], np.int32)
    got = jax.jit(rotate)(x, positions, BASE)
    for b, t in np.ndindex(positions.shape):
        want = turned(x[b, t], positions[b, t], BASE)
        # Angles of up to 100 radians, in float32.
        np.testing.assert_allclose(got[b, t], want, rtol=0, atol=5e-5)


def test_rotary_positions_keep_bfloat16_and_take_angles_in_float32():
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    position = jnp.array([[1001]], jnp.int32)  # bfloat16 has 1000 and 1008
    got = rotate(x, position, BASE)
    assert got.dtype == jnp.bfloat16
    want = turned(np.ones(2), 1001, BASE)
    np.testing.assert_allclose(got[0, 0, 0].astype(jnp.float32), want, rtol=2**-8)


def test_attention_is_the_causal_softmax():
    q, k, v = normal(0, 2, 6, 3, 5), normal(1, 2, 6, 3, 5), normal(2, 2, 6, 3, 4)
    got = jax.jit(attend)(q, k, v)
    want = softmax_attention(*(x.astype(np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(got, want, **CLOSE)


def test_attentions_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    shapes = [(1, 4, 2, 3), (1, 4, 2, 3), (1, 4, 2, 5)]
    arguments = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    ct = rng.standard_normal(shapes[2])
    exact = [x.astype(np.float64) for x in arguments]
    grads = jax.jit(lambda ct, *x: jax.vjp(attend, *x)[1](ct))(
        ct.astype(np.float32), *arguments
    )
    for i, grad in enumerate(grads):
        for index in np.ndindex(grad.shape):

            def shifted(by, i=i, index=index):
                moved = [x.copy() for x in exact]
                moved[i][index] += by
                return (softmax_attention(*moved) * ct).sum()

            difference = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
            np.testing.assert_allclose(grad[index], difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q_lora_rank", [None, 10])
def test_latent_attention_is_the_reports(q_lora_rank):
    config = small(q_lora_rank=q_lora_rank, rope_theta=BASE)
    call, weights = make(config)
    assert ("q_down" in weights) == (q_lora_rank is not None)
    h = normal(3, 2, 5, config.hidden_size)
    want = latent_attention(config, weights, h)
    # The test is one of the attention only if that is no plain mean of the past.
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(call("__call__", h), want, **CLOSE)


def test_latent_attention_sees_no_later_token():
    call, _ = make(small())
    h = normal(0, 1, 6, 12)
    before = call("__call__", h)
    for t in range(6):
        other = h.copy()
        other[0, t] += 1
        after = call("__call__", other)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after - before).max(axis=-1)[0, t:] > 1e-4).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_batches_without_tokens(shape):
    config = small()
    attention = LatentAttention(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(attention)
    x = jnp.zeros((*shape, config.hidden_size))

    def total(params, x):
        y = nnx.merge(graph, params)(x)
        return y.sum(), y

    grads, y = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)
    assert y.shape == grads[1].shape == x.shape
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_scores_see_distances_and_not_positions():
    config = small(rope_theta=BASE)
    call, _ = make(config)
    h = normal(0, 1, 5, config.hidden_size)

    def scores(q_shift, k_shift):
        position = np.arange(5, dtype=np.int32)[None]
        q = call("queries", call("compress", h), position + q_shift)[
            ..., config.qk_nope_head_dim :
        ]
        _, k = call("latents", h, position + k_shift)
        return np.einsum("bthr,bsr->bhts", q, k)

    start = scores(0, 0)
    np.testing.assert_allclose(scores(37, 37), start, rtol=1e-4, atol=1e-4)
    assert np.abs(scores(1, 0) - start).max() > 0.1


def test_only_the_rotary_parts_know_a_position():
    config = small()
    call, _ = make(config)
    h = normal(0, 1, 5, config.hidden_size)
    here = np.zeros((1, 5), np.int32)
    compressed = call("compress", h)
    q, q2 = (call("queries", compressed, here + shift) for shift in (0, 3))
    (latent, rope), (latent2, rope2) = (
        call("latents", h, here + shift) for shift in (0, 3)
    )
    nope = (..., slice(config.qk_nope_head_dim))
    np.testing.assert_array_equal(q[nope], q2[nope])
    np.testing.assert_array_equal(latent, latent2)
    assert np.abs(q - q2).max() > 0.1 and np.abs(rope - rope2).max() > 0.1


def plain_attention(q, k, v):
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    past = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None, None]
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, where=past), v)


def quadratic(function, length, *arguments):
    """Shapes of what AD keeps of a call, as long as the sequence on two axes."""
    pullback = jax.eval_shape(lambda *x: jax.vjp(function, *x)[1], *arguments)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    return [shape for shape in shapes if shape.count(length) > 1]


def test_ad_keeps_nothing_that_grows_with_the_square_of_the_sequence():
    length = 17
    q, v = jnp.ones((1, length, 2, 3)), jnp.ones((1, length, 2, 4))
    assert quadratic(plain_attention, length, q, q, v)  # what the test would see
    assert not quadratic(attend, length, q, q, v)

    call, _ = make(small())
    assert not quadratic(
        lambda x: call("__call__", x), length, jnp.ones((1, length, 12))
    )


def test_bfloat16_in_bfloat16_out():
    config = small()
    call, weights = make(config)
    h = normal(3, 2, 5, config.hidden_size).astype(jnp.bfloat16)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    with jax.numpy_dtype_promotion("standard"):  # flax's norms mix dtypes themselves
        got = call("__call__", h, state=low)
    assert got.dtype == jnp.bfloat16
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float64), low)
    want = latent_attention(config, rounded, h)
    # Half a dozen roundings to 8 bits on the way, of sums that partly cancel.
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error < 0.03


def test_attention_takes_its_scores_in_float32():
    """In bfloat16 both keys would score 256; the softmax would be a mean."""
    q = jnp.array([[[[256.0, 1.0]]] * 2], jnp.bfloat16).reshape(1, 2, 1, 2)
    k = jnp.array([[1.0, 0.0], [1.0, 0.75]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    want = 1 / (1 + math.exp(-0.75 / math.sqrt(2)))
    got = float(attend(q, k, v)[0, 1, 0, 0])
    assert got == pytest.approx(want, rel=2**-8)
    assert abs(want - 0.5) > 0.1
