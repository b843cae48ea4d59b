"""A transformer layer, the output head and the multi-token prediction module.

DeepSeek-V3 report (arXiv:2412.19437), sections 2.1 and 2.2. Shape suffixes: see
`dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dualpipe_jax.deepseek.model.attention import LatentAttention
from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.trees import parameters
from eplb_jax import ExpertParallel, ExpertTables, ExpertWeights, MoE
from eplb_jax.layer import MoEStats, Products, run_network


def _norm(config: DeepSeekConfig, key: jax.Array) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size, epsilon=config.rms_norm_eps, rngs=nnx.Rngs(key)
    )


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(
        self, config: DeepSeekConfig, *, products: Products = "plain", rngs: nnx.Rngs
    ):
        self.products: Products = products

        def linear(into: int, out: int) -> nnx.Linear:
            initial = nnx.initializers.truncated_normal(stddev=config.initializer_range)
            return nnx.Linear(into, out, use_bias=False, kernel_init=initial, rngs=rngs)

        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.products == "fp8":
            parts = self.gate, self.up, self.down
            weights = ExpertWeights(*(part.kernel.get_value() for part in parts))
            return run_network(x_BTD, weights, products=self.products)
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Layer(nnx.Module):
    """A pre-norm layer: latent attention, then a dense network or a mixture of experts.

    All stages of a pipeline have one structure, so a layer may hold both kinds of
    feed-forward network; the method that is called, `feed_forward` or `mix`, chooses
    the one that runs.

    Each part draws its initial values from a separate key, so that they do not depend
    on what else the layer holds.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        parallel: ExpertParallel,
        *,
        has_dense: bool,
        has_moe: bool,
        products: Products = "plain",
        key: jax.Array,
    ):
        c = config
        keys = jax.random.split(key, 5)
        self.attention_norm = _norm(c, keys[0])
        self.attention = LatentAttention(c, products=products, rngs=nnx.Rngs(keys[1]))
        self.feed_forward_norm = _norm(c, keys[2])
        self.dense = nnx.data(
            FeedForward(c, products=products, rngs=nnx.Rngs(keys[3]))
            if has_dense
            else None
        )
        self.moe = nnx.data(
            MoE(
                c.hidden_size,
                c.moe_intermediate_size,
                num_experts=c.n_routed_experts,
                top_k=c.num_experts_per_tok,
                num_shared=c.n_shared_experts,
                router=c.scoring_func,
                num_groups=c.n_group,
                topk_groups=c.topk_group,
                route_norm=c.norm_topk_prob,
                route_scale=c.routed_scaling_factor,
                parallel=parallel,
                products=products,
                rngs=nnx.Rngs(keys[4]),
            )
            if has_moe
            else None
        )

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        """Applies the attention, and adds it to the residual stream."""
        return x_BTD + self.attention(self.attention_norm(x_BTD))

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        """Applies the dense network, and adds it to the residual stream."""
        assert self.dense is not None
        return x_BTD + self.dense(self.feed_forward_norm(x_BTD))

    def mix(
        self, x_BTD: jax.Array, tables: ExpertTables | None
    ) -> tuple[jax.Array, MoEStats]:
        """Applies the mixture of experts, and adds it to the residual stream.

        Args:
          x_BTD: activations.
          tables: where the physical experts are, if this layer holds the weights of the
            device's physical experts; None if it holds the device's share of the
            logical ones.
        """
        assert self.moe is not None
        x = self.feed_forward_norm(x_BTD)
        if tables is None:
            y, stats = self.moe(x)
        else:
            physical = ExpertWeights(*(leaf[...] for leaf in self.moe.experts))
            y, stats = self.moe(x, tables, physical=physical)
        return x_BTD + y, stats


@functools.partial(
    jax.jit, static_argnames=("config", "parallel", "has_dense", "has_moe")
)
def initial_layer(
    config: DeepSeekConfig,
    parallel: ExpertParallel,
    key: jax.Array,
    *,
    has_dense: bool,
    has_moe: bool,
) -> Any:
    """Returns the initial parameters of a `Layer`; each kind is traced once."""
    return parameters(
        Layer(config, parallel, has_dense=has_dense, has_moe=has_moe, key=key)
    )


class Head(nnx.Module):
    """The last norm and, unless it is tied to the embedding, the output matrix."""

    def __init__(self, config: DeepSeekConfig, key: jax.Array):
        keys = jax.random.split(key)
        self.norm = _norm(config, keys[0])
        shape = (config.hidden_size, config.vocab_size)
        initial = nnx.initializers.truncated_normal(stddev=config.initializer_range)
        self.kernel = nnx.data(
            None if config.tie_word_embeddings else nnx.Param(initial(keys[1], shape))
        )


class MultiTokenPrediction(nnx.Module):
    """The multi-token prediction module, depth 1: predicts the token after the next.

    It combines the model's activations at a position with the embedding of the next
    token, runs one more layer, and shares embedding and output matrix with the model
    (section 2.2, equations 21 to 23).
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        parallel: ExpertParallel,
        key: jax.Array,
        products: Products = "plain",
    ):
        keys = jax.random.split(key, 5)
        self.hidden_norm, self.token_norm, self.norm = (
            _norm(config, key) for key in keys[:3]
        )
        shape = (2 * config.hidden_size, config.hidden_size)
        initial = nnx.initializers.truncated_normal(stddev=config.initializer_range)
        self.project = nnx.Param(initial(keys[3], shape))
        self.layer = Layer(
            config,
            parallel,
            has_dense=False,
            has_moe=True,
            products=products,
            key=keys[4],
        )

    def __call__(
        self, x_BTD: jax.Array, next_BTD: jax.Array, tables: ExpertTables | None
    ) -> tuple[jax.Array, MoEStats]:
        """Returns normalized activations, from which the output matrix makes logits.

        Args:
          x_BTD: output of the last layer.
          next_BTD: embeddings of the next tokens.
          tables: see `Layer.mix`.
        """
        joined = jnp.concatenate(
            [self.hidden_norm(x_BTD), self.token_norm(next_BTD)], axis=-1
        )
        y, stats = self.layer.mix(self.layer.attend(joined @ self.project[...]), tables)
        return self.norm(y), stats
