"""The two forward passes of a server: of whole prompts, and of one token per request.

Plain functions of one microbatch, for use inside `jax.shard_map`. Shape suffixes: see
`dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dualpipe_jax.deepseek.model import DeepSeekConfig, Head, Layer, logits_of
from dualpipe_jax.deepseek.serve.arrays import (
    Loads,
    Prompts,
    Requests,
    Sampling,
    ServeParams,
)
from dualpipe_jax.deepseek.serve.config import ServeConfig
from dualpipe_jax.deepseek.serve.rows import Rows
from dualpipe_jax.deepseek.serve.sampling import choose_tokens
from eplb_jax import ExpertTables, ExpertWeights, MoEStats
from eplb_jax.layer import ONE_DEVICE, Products
from eplb_jax.placement import take_or_zero
from eplb_jax.products import cross_compiling


@dataclasses.dataclass(frozen=True)
class Forward:
    """The model of a server, for microbatches of one size.

    Attributes:
      config: of the server.
      num_tokens: tokens of a microbatch on a device.
      is_on_gpu: whether it is for GPUs, which may only be compiled for.
    """

    config: ServeConfig
    num_tokens: int
    is_on_gpu: bool = False

    @functools.cached_property
    def _graphs(self) -> list[Any]:
        """The structure of each layer's module, without its arrays."""
        arch = self.config.architecture

        def make(dense: bool) -> Any:
            module = nnx.merge(*_layer(arch, dense, self.config.products))
            if module.moe is not None:
                # Only physical experts are divided over the devices here.
                module.moe.experts = None
                module.moe.parallel = self.config.parallel(self.num_tokens)
            return nnx.graphdef(module)

        is_dense = [arch.is_dense(layer) for layer in range(arch.num_hidden_layers)]
        graphs = {dense: make(dense) for dense in set(is_dense)}
        return [graphs[dense] for dense in is_dense]

    def prefill(
        self,
        params: ServeParams,
        tables: ExpertTables,
        prompts: Prompts,
        earlier: list[jax.Array] | None = None,
    ) -> tuple[Any, list[jax.Array]]:
        """Computes whole prompts, or the two parts of one.

        Args:
          params: of the server.
          tables: of all MoE layers.
          prompts: the microbatch.
          earlier: what the call for the microbatch before returned as `handed`: its
            last row may be the beginning of the prompt that row 0 continues.

        Returns:
          outputs: tokens [B] int32 that follow the prompts whose last token is here,
            latents (for each layer [M, W]), and the `Loads`.
          handed: for each layer [T, W], the latents of the last row.
        """
        rows = Rows.of(prompts, self.config.max_prompt_length)
        handed, latents = [], []

        def attend(layer: int, x_MD: jax.Array) -> jax.Array:
            before = None if earlier is None else earlier[layer]
            x_MD, latent_MW, last_TW = _attend_in_prompts(
                self._graphs[layer],
                self.is_on_gpu,
                params.layers[layer],
                x_MD,
                prompts.positions,
                rows,
                before,
            )
            latents.append(latent_MW)
            handed.append(last_TW)
            return x_MD

        x_MD, loads = self._layers(
            params, tables, params.embed[prompts.tokens], prompts.rows < 0, attend
        )
        x_BD = take_or_zero(x_MD, prompts.last)
        position_B = take_or_zero(prompts.positions, prompts.last)
        tokens_B = self._next(params, x_BD, position_B, prompts.sampling)
        return (tokens_B, latents, loads), handed

    def decode(
        self,
        params: ServeParams,
        tables: ExpertTables,
        requests: Requests,
        caches: list[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array], Loads]:
        """Computes one token of each request.

        Args:
          params: of the server.
          tables: of all MoE layers.
          requests: the microbatch.
          caches: for each layer [B, positions, W].

        Returns:
          tokens: [B] int32.
          caches: with the latents of the given tokens added.
          loads: of the experts.
        """
        caches = list(caches)

        def attend(layer: int, x_BD: jax.Array) -> jax.Array:
            x_BD, caches[layer] = _attend_to_cache(
                self._graphs[layer],
                self.is_on_gpu,
                params.layers[layer],
                x_BD,
                requests.positions,
                caches[layer],
            )
            return x_BD

        x_BD, loads = self._layers(
            params, tables, params.embed[requests.tokens], requests.is_idle, attend
        )
        tokens_B = self._next(params, x_BD, requests.positions, requests.sampling)
        return tokens_B, caches, loads

    def _layers(
        self,
        params: ServeParams,
        tables: ExpertTables,
        x: jax.Array,
        is_padding,
        attend,
    ) -> tuple[jax.Array, Loads]:
        """Runs all layers; `attend` takes a layer's number and input."""
        counts, overflow = [], jnp.zeros((), jnp.int32)
        for layer, graph in enumerate(self._graphs):
            arrays = params.layers[layer]
            x = attend(layer, x)
            if self.config.architecture.is_dense(layer):
                x = _feed_forward(graph, arrays, x)
                continue
            moe = len(counts)
            x, stats = _mix(
                graph,
                self.is_on_gpu,
                arrays,
                x,
                tables.layer(moe),
                params.experts[moe],
                is_padding,
            )
            counts.append(stats.tokens_per_expert)
            overflow += stats.overflow
        return x, Loads(jnp.stack(counts), overflow)

    def _next(
        self,
        params: ServeParams,
        x_BD: jax.Array,
        position_B: jax.Array,
        sampling: Sampling,
    ) -> jax.Array:
        """Chooses the tokens [B] that follow those at the given positions."""
        arch = self.config.architecture
        hidden_BD = nnx.merge(_head(arch), params.head).norm(x_BD)
        tied = arch.tie_word_embeddings
        kernel = params.embed.T if tied else params.head["kernel"]
        logits_BU = logits_of(hidden_BD[None], kernel)[0]
        return choose_tokens(logits_BU, position_B + 1, sampling)


# Structures are made once for all programs: making them traces all initial values.


@functools.cache
def _layer(arch: DeepSeekConfig, dense: bool, products: Products) -> tuple[Any, Any]:
    """Returns the structure of a layer, and the shapes of its arrays."""

    def make() -> Layer:
        key = jax.random.key(0)
        kinds = {"has_dense": dense, "has_moe": not dense}
        return Layer(arch, ONE_DEVICE, **kinds, products=products, key=key)

    return nnx.split(nnx.eval_shape(make))


@functools.cache
def _head(arch: DeepSeekConfig) -> Any:
    """Returns the structure of the head."""
    return nnx.graphdef(nnx.eval_shape(lambda: Head(arch, jax.random.key(0))))


# The parts of a layer are functions of their own so that layers of one structure are
# traced, and lowered, once.
_part_of_layer = functools.partial(jax.jit, static_argnames=("graph", "is_on_gpu"))


@_part_of_layer
def _attend_in_prompts(
    graph: Any,
    is_on_gpu: bool,
    arrays: Any,
    x_MD: jax.Array,
    position_M: jax.Array,
    rows: Rows,
    earlier_TW: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the attention of a layer over prompts; see `Forward.prefill`.

    Returns:
      The layer's state, the latents [M, W] of all tokens, and those [T, W] of the last
      row.
    """
    module = nnx.merge(graph, arrays)
    attention, c = module.attention, module.attention.config
    with jax.named_scope("attn"), _kernels(is_on_gpu):
        x_1MD = attention.operand(module.attention_norm(x_MD)[None])
        pair = attention.latents(x_1MD, position_M[None])
        latent_MW = jnp.concatenate(pair, axis=-1)[0]
        kept_BTW = rows.spread(latent_MW)
        if earlier_TW is not None:
            is_token_T1 = rows.is_token_BT[0][:, None]
            first_TW = jnp.where(is_token_T1, kept_BTW[0], earlier_TW)
            kept_BTW = kept_BTW.at[0].set(first_TW)
        compressed = jax.tree.map(
            lambda leaf_1M: rows.spread(leaf_1M[0]), attention.compress(x_1MD)
        )
        q_BTHK = attention.queries(compressed, rows.position_BT)
        latent_BTC, rope_BTR = jnp.split(kept_BTW, [c.kv_lora_rank], axis=-1)
        v_BTHV = attention.mix(q_BTHK, latent_BTC, rope_BTR)
        x_MD = x_MD + attention.output(rows.gather(v_BTHV))
    return x_MD, latent_MW, kept_BTW[-1]


@_part_of_layer
def _attend_to_cache(
    graph: Any,
    is_on_gpu: bool,
    arrays: Any,
    x_BD: jax.Array,
    position_B: jax.Array,
    cache_BSW: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the attention of a layer for one token of each request."""
    module = nnx.merge(graph, arrays)
    with jax.named_scope("attn"), _kernels(is_on_gpu):
        y_BD, cache_BSW = module.attention.decode(
            module.attention_norm(x_BD), position_B, cache_BSW
        )
        return x_BD + y_BD, cache_BSW


@functools.partial(jax.jit, static_argnames="graph")
def _feed_forward(graph: Any, arrays: Any, x: jax.Array) -> jax.Array:
    """Runs the dense network of a layer."""
    return nnx.merge(graph, arrays).feed_forward(x)


@_part_of_layer
def _mix(
    graph: Any,
    is_on_gpu: bool,
    arrays: Any,
    x: jax.Array,
    tables: ExpertTables,
    physical: ExpertWeights,
    is_padding: jax.Array,
) -> tuple[jax.Array, MoEStats]:
    """Runs the experts of a layer; returns the layer's output and their statistics."""
    module = nnx.merge(graph, arrays)
    with _kernels(is_on_gpu):
        y, stats = module.moe(
            module.feed_forward_norm(x),
            tables,
            physical=physical,
            is_padding=is_padding,
        )
    return x + y, stats


def _kernels(is_on_gpu: bool) -> contextlib.AbstractContextManager[None]:
    """Enables kernels for GPUs, which may only be compiled for."""
    return cross_compiling() if is_on_gpu else contextlib.nullcontext()
