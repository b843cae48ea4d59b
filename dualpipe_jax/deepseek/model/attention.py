"""Multi-head latent attention with decoupled rotary positions.

DeepSeek-V3 report (arXiv:2412.19437), section 2.1.1; its names for the matrices are
given in parentheses. Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.projections import matrix, operand, project
from dualpipe_jax.deepseek.model.rope import rotate
from eplb_jax.layer import Products
from eplb_jax.products import ScaledRows, load_tokamax, on_cuda

# DeepSeek's code and others give the norms inside the attention no epsilon of the
# config: it is this, whatever `rms_norm_eps` is.
INNER_EPSILON = 1e-6


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    *,
    score_scale: float = 1.0,
) -> jax.Array:
    """Computes causal softmax attention; keys and values may differ in width.

    The probabilities, which grow with the square of the sequence, are recomputed in the
    backward pass. When compiled for CUDA with tokamax installed, its flash attention
    (arXiv:2205.14135) is used, and they never reach memory.

    Args:
      q_BTHK: [batch, sequence, heads, K].
      k_BTHK: the same.
      v_BTHV: [batch, sequence, heads, V].
      score_scale: factor of the scores, beside 1 / sqrt(K).

    Returns:
      [batch, sequence, heads, V]; the softmax is computed in float32.

    Examples:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> attend(x, x, jnp.arange(3.0).reshape(1, 3, 1, 1) * x).round(1)[0, :, 0, 0]
      Array([0. , 0.5, 1. ], dtype=float32)
    """
    if not v_BTHV.size:
        return v_BTHV  # no sequences, or no positions to attend to
    divisor = math.sqrt(q_BTHK.shape[-1]) / score_scale
    return on_cuda(
        lambda q, k, v: _by_kernel(q, k, v, divisor),
        lambda q, k, v: _by_xla(q, k, v, divisor),
        *(q_BTHK, k_BTHK, v_BTHV),
        keep=True,
    )


def _by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, divisor: float) -> jax.Array:
    tokamax = load_tokamax()
    return tokamax.dot_product_attention(
        q, k, v, scale=1 / divisor, is_causal=True, implementation="triton"
    )


# Only the arguments are kept for the backward pass.
@functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.nothing_saveable,
    static_argnums=3,
)
def _by_xla(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHV: jax.Array, divisor: float
) -> jax.Array:
    # Queries and keys are of the same positions.
    position_T = jnp.arange(q_BTHK.shape[1], dtype=jnp.int32)
    is_past_TS = position_T[:, None] >= position_T[None]
    return _attend_where(is_past_TS[None, None], q_BTHK, k_BSHK, v_BSHV, divisor)


def _attend_where(
    is_seen_BHTS: jax.Array,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    divisor: float,
) -> jax.Array:
    """Attends to what a mask says, of which B and H may be 1."""
    scores_BHTS = jnp.einsum(
        "bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32
    )
    scores_BHTS = jnp.where(is_seen_BHTS, scores_BHTS / divisor, -jnp.inf)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHV.dtype)
    return jnp.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV)


def attend_at(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    position_BT: jax.Array,
    *,
    score_scale: float = 1.0,
) -> jax.Array:
    """Computes what `attend` does, for queries of a part of the positions.

    Args:
      q_BTHK: [batch, queries, heads, K].
      k_BSHK: [batch, sequence, heads, K].
      v_BSHV: [batch, sequence, heads, V].
      position_BT: [batch, queries] int32, place of each query in the sequence.
      score_scale: see `attend`.

    Returns:
      [batch, queries, heads, V].

    Examples:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> values = jnp.arange(3.0).reshape(1, 3, 1, 1) * x
      >>> attend_at(x[:, 1:2], x, values, jnp.array([[1]]))[0, :, 0, 0]
      Array([0.5], dtype=float32)
    """
    divisor = math.sqrt(q_BTHK.shape[-1]) / score_scale
    position_S = jnp.arange(k_BSHK.shape[1], dtype=jnp.int32)
    is_past_BTS = position_BT[..., None] >= position_S[None, None]
    return _attend_where(is_past_BTS[:, None], q_BTHK, k_BSHK, v_BSHV, divisor)


class LatentAttention(nnx.Module):
    """Causal multi-head latent attention.

    Attributes:
      q_down, q_norm, q_up: compression of the queries (W^DQ, W^UQ with W^QR); without
        compression only `q_up`, from the residual stream.
      kv_down: to the latent, and to the one key with a position that all heads share
        (W^DKV with W^KR).
      kv_norm: norm of the latent.
      kv_up: from the latent to each head's key and value (W^UK with W^UV).
      out: from the heads' values to the residual stream (W^O).
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        *,
        products: Products = "plain",
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          config: the sizes.
          products: of these matrices, see `DeepSeek`; scores and what is mixed by them
            are not quantized.
          rngs: provides the key stream `params`.
        """
        c = self.config = config
        self.products: Products = products
        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=False,
            kernel_init=nnx.initializers.truncated_normal(stddev=c.initializer_range),
            rngs=rngs,
        )
        norm = functools.partial(nnx.RMSNorm, epsilon=INNER_EPSILON, rngs=rngs)
        width, heads, rank = c.hidden_size, c.num_attention_heads, c.q_lora_rank
        self.q_down = nnx.data(linear(width, rank) if rank else None)
        self.q_norm = nnx.data(norm(rank) if rank else None)
        self.q_up = linear(rank or width, (heads, c.qk_head_dim))
        self.kv_down = linear(width, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_norm = norm(c.kv_lora_rank)
        self.kv_up = linear(c.kv_lora_rank, (heads, c.qk_nope_head_dim + c.v_head_dim))
        self.out = linear((heads, c.v_head_dim), width, axis=(-2, -1))

    def operand(self, x: jax.Array) -> jax.Array | ScaledRows:
        """Returns the input of `compress` and `latents`, quantized once for both."""
        return operand(x, self.products)

    def compress(self, x: jax.Array | ScaledRows) -> jax.Array | ScaledRows:
        """Returns the queries' compression, [..., Q]; without one, `x` itself."""
        if self.q_down is None or self.q_norm is None:
            return x
        shape = (self.config.q_lora_rank or 0,)
        return self.operand(self.q_norm(project(self.q_down, x, shape)))

    def queries(
        self, compressed_BTQ: jax.Array | ScaledRows, positions_BT: jax.Array
    ) -> jax.Array:
        """Returns [batch, sequence, heads, N + R], in this order of the parts."""
        c = self.config
        shape = c.num_attention_heads, c.qk_head_dim
        q_BTHK = project(self.q_up, compressed_BTQ, shape)
        nope, rope = jnp.split(q_BTHK, [c.qk_nope_head_dim], axis=-1)
        rope = rotate(rope, positions_BT, c.rope_theta, c.rope_scaling)
        return jnp.concatenate([nope, rope], axis=-1)

    def latents(
        self, x_BTD: jax.Array | ScaledRows, positions_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what a cache keeps: [batch, sequence, C] and [batch, sequence, R]."""
        c = self.config
        width = c.kv_lora_rank + c.qk_rope_head_dim
        both = project(self.kv_down, x_BTD, (width,))
        latent, rope = jnp.split(both, [c.kv_lora_rank], axis=-1)
        rope_BT1R = rotate(rope[:, :, None], positions_BT, c.rope_theta, c.rope_scaling)
        return self.kv_norm(latent), rope_BT1R[:, :, 0]

    def mix(
        self,
        q_BTHK: jax.Array,
        latent_BTC: jax.Array,
        rope_BTR: jax.Array,
        position_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Attends to each position and those before it.

        Args:
          q_BTHK: see `queries`.
          latent_BTC: see `latents`, of all positions from 0 on.
          rope_BTR: the same.
          position_BT: of the queries; None: they are of the same positions.

        Returns:
          [batch, sequence, heads, V].
        """
        c = self.config
        shape = c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim
        both = project(self.kv_up, self.operand(latent_BTC), shape)
        nope, v_BTHV = jnp.split(both, [c.qk_nope_head_dim], axis=-1)
        rope = jnp.broadcast_to(
            rope_BTR[:, :, None], (*nope.shape[:3], c.qk_rope_head_dim)
        )
        k_BTHK = jnp.concatenate([nope, rope], axis=-1)
        scale = c.score_scale
        if position_BT is not None:
            return attend_at(q_BTHK, k_BTHK, v_BTHV, position_BT, score_scale=scale)
        return attend(q_BTHK, k_BTHK, v_BTHV, score_scale=scale)

    def output(self, v_BTHV: jax.Array) -> jax.Array:
        """Returns what is added to the residual stream, [..., D].

        Scales are powers of two, as in the report (section 3.3.3): quantizing again
        along the other axis, for the gradient of the matrix, then loses nothing.
        """
        *leading, heads, width = v_BTHV.shape
        flat = v_BTHV.reshape(*leading, heads * width)
        scaled = operand(flat, self.products, powers_of_two=True)
        return project(self.out, scaled, (self.config.hidden_size,))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        batch, sequence, _ = x_BTD.shape
        positions_BT = jnp.broadcast_to(
            jnp.arange(sequence, dtype=jnp.int32)[None], (batch, sequence)
        )
        x = self.operand(x_BTD)
        q_BTHK = self.queries(self.compress(x), positions_BT)
        return self.output(self.mix(q_BTHK, *self.latents(x, positions_BT)))

    def decode(
        self, x_BD: jax.Array, positions_B: jax.Array, cache_BSW: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Computes one more token of each sequence, with its past in a cache.

        Keys and values are never materialized: the matrices that would produce them are
        absorbed into the queries and into the output (section 2.1.1 and
        arXiv:2405.04434, section 2.1.2).

        Args:
          x_BD: [batch, D].
          positions_B: [batch] int32, positions of these tokens.
          cache_BSW: [batch, positions, C + R], see `latents`.

        Returns:
          outputs: [batch, D].
          cache: with the latents of these tokens added.
        """
        c = self.config
        position_B1 = positions_B[:, None]
        x = self.operand(x_BD[:, None])
        q_BHK = self.queries(self.compress(x), position_B1)[:, 0]
        pair = self.latents(x, position_B1)
        new_BW = jnp.concatenate(pair, axis=-1)[:, 0]
        batch_B = jnp.arange(len(x_BD), dtype=jnp.int32)
        cache_BSW = cache_BSW.at[batch_B, positions_B].set(
            new_BW.astype(cache_BSW.dtype),
            unique_indices=True,
            mode="promise_in_bounds",
            wrap_negative_indices=False,
        )
        # Absorbed, it is a part of the attention, and not in float8.
        up_CHM = matrix(self.kv_up, x_BD.dtype)
        up_CHM = up_CHM.reshape(len(up_CHM), c.num_attention_heads, -1)
        up_CHN, up_CHV = jnp.split(up_CHM, [c.qk_nope_head_dim], axis=-1)
        nope_BHN, rope_BHR = jnp.split(q_BHK, [c.qk_nope_head_dim], axis=-1)
        q_BHC = jnp.einsum("bhn,chn->bhc", nope_BHN, up_CHN)
        q_BHW = jnp.concatenate([q_BHC, rope_BHR], axis=-1)
        scores_BHS = jnp.einsum(
            "bhw,bsw->bhs", q_BHW, cache_BSW, preferred_element_type=jnp.float32
        )
        position_S = jnp.arange(cache_BSW.shape[1], dtype=jnp.int32)
        is_past_BS = position_S[None] <= position_B1
        divisor = math.sqrt(c.qk_head_dim) / c.score_scale
        scores_BHS = jnp.where(is_past_BS[:, None], scores_BHS / divisor, -jnp.inf)
        weights_BHS = jax.nn.softmax(scores_BHS, axis=-1).astype(cache_BSW.dtype)
        # Over the whole cache: R is a ninth of this product in DeepSeek-V3, and slicing
        # it off first would copy the cache.
        mixed_BHW = jnp.einsum("bhs,bsw->bhw", weights_BHS, cache_BSW)
        v_BHV = jnp.einsum("bhc,chv->bhv", mixed_BHW[..., : c.kv_lora_rank], up_CHV)
        return self.output(v_BHV), cache_BSW
