"""A small pre-norm transformer in Flax NNX, cut into stages of equal shape.

Shape suffixes: B batch, T sequence, D width, H heads, K width of a head.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dualpipe_jax.pipeline import PipelineParams
from dualpipe_jax.train.config import PipelineFns

NUM_BYTES = 256


def rotate(x_BTHK: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, section 3.4.2), halves as pairs."""
    sequence, half = x_BTHK.shape[1], x_BTHK.shape[-1] // 2
    frequency = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.outer(jnp.arange(sequence, dtype=jnp.float32), frequency)
    cos, sin = (
        f(angle)[None, :, None, :].astype(x_BTHK.dtype) for f in (jnp.cos, jnp.sin)
    )
    first, second = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        linear = functools.partial(
            nnx.LinearGeneral, use_bias=False, kernel_init=_initializer, rngs=rngs
        )
        self.qkv = linear(width, (3, num_heads, width // num_heads))
        self.out = linear((num_heads, width // num_heads), width, axis=(-2, -1))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        q_BTHK, k_BTHK, v_BTHK = jnp.moveaxis(self.qkv(x_BTD), 2, 0)
        return self.out(
            jax.nn.dot_product_attention(
                rotate(q_BTHK), rotate(k_BTHK), v_BTHK, is_causal=True
            )
        )


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        linear = functools.partial(
            nnx.Linear, use_bias=False, kernel_init=_initializer, rngs=rngs
        )
        self.gate = linear(width, hidden)
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, hidden: int, num_heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, num_heads, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(width, rngs=rngs)
        self.feed_forward = FeedForward(width, hidden, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class Head(nnx.Module):
    """The last norm and the projection to logits."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.logits = nnx.Linear(
            width,
            NUM_BYTES,
            use_bias=False,
            # Logits of variance 1/4: near the uniform loss, and soon away from it.
            kernel_init=nnx.initializers.variance_scaling(0.25, "fan_in", "normal"),
            rngs=rngs,
        )

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.logits(self.norm(x_BTD))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A byte-level language model; `build` lays it over a pipeline's stages.

    Attributes:
      width: of the residual stream.
      hidden: width inside a feed-forward layer.
      num_heads: attention heads; each is width / num_heads wide.
      num_layers: blocks, spread evenly over the stages.
    """

    width: int
    hidden: int
    num_heads: int
    num_layers: int

    def build(self, num_stages: int) -> PipelineFns:
        """The model as pure functions over `num_stages` stages of equal shape.

        Raises:
          ValueError: the layers cannot be spread evenly, or the heads are not of an
            even width.
        """
        if self.num_layers % num_stages or not self.num_layers:
            raise ValueError(
                f"{self.num_layers=} must be a positive multiple of {num_stages=}; "
                "change the model's layers or the pipeline's ranks."
            )
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"{self.width=} must be divisible by 2 * {self.num_heads=}: rotary "
                "positions turn pairs."
            )

        def stage(rngs: nnx.Rngs) -> nnx.Sequential:
            return nnx.Sequential(
                *(
                    Block(self.width, self.hidden, self.num_heads, rngs=rngs)
                    for _ in range(self.num_layers // num_stages)
                )
            )

        def embed(rngs: nnx.Rngs) -> nnx.Embed:
            return nnx.Embed(NUM_BYTES, self.width, rngs=rngs)

        def head(rngs: nnx.Rngs) -> Head:
            return Head(self.width, rngs=rngs)

        # The structure without the arrays; `init` makes those, from its key.
        stage_def, embed_def, head_def = (
            nnx.graphdef(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
            for make in (stage, embed, head)
        )

        def init(key: jax.Array) -> PipelineParams:
            stage_key, embed_key, head_key = jax.random.split(key, 3)
            # Under vmap: one stage is traced and compiled, and not all of them.
            stages = jax.vmap(lambda key: nnx.state(stage(nnx.Rngs(key))))(
                jax.random.split(stage_key, num_stages)
            )
            return PipelineParams(
                stages=stages,
                embed=nnx.state(embed(nnx.Rngs(embed_key))),
                head=nnx.state(head(nnx.Rngs(head_key))),
            )

        def loss_fn(params, x_BTD, targets_BT):
            logits = nnx.merge(head_def, params)(x_BTD).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets_BT)
            return losses.mean()

        return PipelineFns(
            init=init,
            embed_fn=lambda params, tokens: nnx.merge(embed_def, params)(tokens),
            stage_fn=lambda params, x_BTD: nnx.merge(stage_def, params)(x_BTD),
            loss_fn=loss_fn,
        )


_initializer = nnx.initializers.truncated_normal(stddev=0.02)
