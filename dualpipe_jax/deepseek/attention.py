"""Multi-head latent attention with decoupled rotary positions.

DeepSeek-V3 report (arXiv:2412.19437), section 2.1.1; its names for the matrices are
given in brackets. Shape suffixes: see `dualpipe_jax.deepseek.config`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dualpipe_jax.deepseek.config import DeepSeekConfig
from eplb_jax.kernels import load_tokamax, on_cuda


def rotate(x_BTHR: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), neighbours as pairs.

    Args:
      x_BTHR: [batch, sequence, heads, R], R even.
      positions_BT: [batch, sequence] int32.
      base: the slowest pair turns by about 1 / base a position.

    Returns:
      Like `x_BTHR`; angles are taken in float32.

    Examples:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> rotate(x, jnp.array([[0, 1]]), 10_000.0)[0, :, 0].round(3).tolist()
      [[1.0, 1.0], [-0.30..., 1.38...]]
    """
    half = x_BTHR.shape[-1] // 2
    frequency = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[..., None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    pairs = x_BTHR.astype(jnp.float32).reshape(*x_BTHR.shape[:-1], half, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.reshape(x_BTHR.shape).astype(x_BTHR.dtype)


def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array) -> jax.Array:
    """Causal softmax attention; keys and values may differ in width.

    The probabilities, which grow with the square of the sequence, are computed again in
    the backward pass. Compiled for CUDA with tokamax installed, its flash attention
    (arXiv:2205.14135) does the work, and they never reach memory.

    Args:
      q_BTHK: [batch, sequence, heads, K].
      k_BTHK: the same.
      v_BTHV: [batch, sequence, heads, V].

    Returns:
      [batch, sequence, heads, V]; the softmax is taken in float32.

    Examples:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> attend(x, x, jnp.arange(3.0).reshape(1, 3, 1, 1) * x).round(1)[0, :, 0, 0]
      Array([0. , 0.5, 1. ], dtype=float32)
    """
    return on_cuda(_by_kernel, _by_xla, q_BTHK, k_BTHK, v_BTHV, keep=True)


def _by_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    tokamax = load_tokamax()
    return tokamax.dot_product_attention(
        q, k, v, is_causal=True, implementation="triton"
    )


# What AD keeps are the arguments.
@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
def _by_xla(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array) -> jax.Array:
    scores_BHTS = jnp.einsum(
        "bthk,bshk->bhts", q_BTHK, k_BTHK, preferred_element_type=jnp.float32
    )
    scores_BHTS = scores_BHTS / math.sqrt(q_BTHK.shape[-1])
    position_T = jnp.arange(q_BTHK.shape[1], dtype=jnp.int32)
    is_past_TS = position_T[:, None] >= position_T[None]
    scores_BHTS = jnp.where(is_past_TS[None, None], scores_BHTS, -jnp.inf)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BTHV.dtype)
    return jnp.einsum("bhts,bshv->bthv", weights_BHTS, v_BTHV)


class LatentAttention(nnx.Module):
    """Causal multi-head latent attention.

    Attributes:
      q_down, q_norm, q_up: the queries' compression (W^DQ, W^UQ with W^QR); without
        compression there is `q_up` alone, from the residual stream.
      kv_down: to the latent, and to the one key with a position that all heads share
        (W^DKV with W^KR).
      kv_norm: of the latent.
      kv_up: from the latent to each head's key and value (W^UK with W^UV).
      out: from the heads' values to the residual stream (W^O).
    """

    def __init__(self, config: DeepSeekConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=False,
            kernel_init=nnx.initializers.truncated_normal(stddev=c.init_std),
            rngs=rngs,
        )
        norm = functools.partial(nnx.RMSNorm, epsilon=c.norm_epsilon, rngs=rngs)
        heads = (c.num_heads, c.head_dim)
        self.q_down = nnx.data(linear(c.dim, c.q_rank) if c.q_rank else None)
        self.q_norm = nnx.data(norm(c.q_rank) if c.q_rank else None)
        self.q_up = linear(c.q_rank or c.dim, heads)
        self.kv_down = linear(c.dim, c.kv_rank + c.rope_dim)
        self.kv_norm = norm(c.kv_rank)
        self.kv_up = linear(c.kv_rank, (c.num_heads, c.nope_dim + c.value_dim))
        self.out = linear((c.num_heads, c.value_dim), c.dim, axis=(-2, -1))

    def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """[batch, sequence, heads, N + R]: the part without a position comes first."""
        c = self.config
        compressed = x_BTD
        if self.q_down is not None and self.q_norm is not None:
            compressed = self.q_norm(self.q_down(x_BTD))
        nope, rope = jnp.split(self.q_up(compressed), [c.nope_dim], axis=-1)
        rope = rotate(rope, positions_BT, c.rope_base)
        return jnp.concatenate([nope, rope], axis=-1)

    def latents(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What a cache keeps: [batch, sequence, kv_rank] and [batch, sequence, R]."""
        c = self.config
        latent, rope = jnp.split(self.kv_down(x_BTD), [c.kv_rank], axis=-1)
        rope_BT1R = rotate(rope[:, :, None], positions_BT, c.rope_base)
        return self.kv_norm(latent), rope_BT1R[:, :, 0]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        batch, sequence, _ = x_BTD.shape
        positions_BT = jnp.broadcast_to(
            jnp.arange(sequence, dtype=jnp.int32)[None], (batch, sequence)
        )
        q_BTHK = self.queries(x_BTD, positions_BT)
        latent, rope_BTR = self.latents(x_BTD, positions_BT)
        nope, v_BTHV = jnp.split(self.kv_up(latent), [c.nope_dim], axis=-1)
        rope = jnp.broadcast_to(
            rope_BTR[:, :, None], (batch, sequence, c.num_heads, c.rope_dim)
        )
        k_BTHK = jnp.concatenate([nope, rope], axis=-1)
        return self.out(attend(q_BTHK, k_BTHK, v_BTHV))
