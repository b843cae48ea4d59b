"""The two forward passes of a server: of whole prompts, and of one token per request.

Plain functions of one microbatch, for use inside `jax.shard_map`. Shape suffixes: see
`dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dualpipe_jax.deepseek.model import DeepSeekConfig, Head, Layer, logits_of
from dualpipe_jax.deepseek.serve.arrays import (
    Loads,
    Prompts,
    Requests,
    ServeParams,
)
from dualpipe_jax.deepseek.serve.attending import (
    Handed,
    Pieces,
    attend_in_prompts,
    attend_to_cache,
    kernels,
    part_of_layer,
)
from dualpipe_jax.deepseek.serve.config import ServeConfig
from dualpipe_jax.deepseek.serve.rows import Rows
from eplb_jax import ExpertTables, ExpertWeights, MoEStats
from eplb_jax.layer import ONE_DEVICE, Products
from eplb_jax.placement import take_or_zero


@dataclasses.dataclass(frozen=True)
class Forward:
    """The model of a server, for microbatches of one size.

    Attributes:
      config: of the server.
      num_tokens: tokens of a microbatch on a device.
      is_on_gpu: whether it is for GPUs, which may only be compiled for.
      is_exact: see `ServeConfig`.
    """

    config: ServeConfig
    num_tokens: int
    is_on_gpu: bool = False
    is_exact: bool = False

    @functools.cached_property
    def _graphs(self) -> list[Any]:
        """The structure of each layer's module, without its arrays."""
        arch = self.config.architecture

        def make(dense: bool) -> Any:
            module = nnx.merge(*_layer(arch, dense, self.config.products))
            if module.moe is not None:
                # Only physical experts are divided over the devices here.
                module.moe.experts = None
                module.moe.parallel = self.config.parallel(
                    self.num_tokens, self.is_exact
                )
            return nnx.graphdef(module)

        is_dense = [arch.is_dense(layer) for layer in range(arch.num_hidden_layers)]
        graphs = {dense: make(dense) for dense in set(is_dense)}
        return [graphs[dense] for dense in is_dense]

    def prefill(
        self,
        params: ServeParams,
        tables: ExpertTables,
        prompts: Prompts,
        handed: Handed | None = None,
        caches: Sequence[list[jax.Array]] | None = None,
    ) -> tuple[Any, Handed]:
        """Computes whole prompts, the two parts of one, or pieces of long ones.

        Args:
          params: of the server.
          tables: of all MoE layers.
          prompts: the microbatch.
          handed: what the call for the microbatch before returned as such: its last row
            may be the beginning of the prompt that row 0 continues.
          caches: for each half and layer, with the pieces before these; None: prompts
            are not computed in pieces.

        Returns:
          outputs: logits [B, U] of what follows the prompts whose last token is here,
            latents (for each layer [M, W]), and the `Loads`.
          handed: of the last row.
        """
        rows = Rows.of(prompts, self.config.max_prompt_length)
        pieces = None
        if caches is not None:
            pieces = Pieces.of(prompts, self.config.requests_per_device)
        lasts, latents = [], []

        def attend(layer: int, x_MD: jax.Array) -> jax.Array:
            x_MD, latent_MW, last_TW = attend_in_prompts(
                self._graphs[layer],
                self.is_on_gpu,
                params.layers[layer],
                x_MD,
                prompts.positions,
                rows,
                None if handed is None else handed.row(layer),
                None if caches is None else [half[layer] for half in caches],
                pieces,
            )
            latents.append(latent_MW)
            lasts.append(last_TW)
            return x_MD

        x_MD, loads = self._layers(
            params, tables, params.embed[prompts.tokens], prompts.rows < 0, attend
        )
        x_BD = take_or_zero(x_MD, prompts.last)
        logits_BU = self._logits(params, x_BD)
        return (logits_BU, latents, loads), Handed(lasts, prompts.request_slots[-1])

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
          logits: [B, U], of the next tokens.
          caches: with the latents of the given tokens added.
          loads: of the experts.
        """
        caches = list(caches)

        def attend(layer: int, x_BD: jax.Array) -> jax.Array:
            x_BD, caches[layer] = attend_to_cache(
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
        return self._logits(params, x_BD), caches, loads

    def _layers(
        self,
        params: ServeParams,
        tables: ExpertTables,
        x: jax.Array,
        is_padding,
        attend,
    ) -> tuple[jax.Array, Loads]:
        """Runs all layers; `attend` takes a layer's number and input."""
        counts, overflow, fetched = [], jnp.int32(0), jnp.int32(0)
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
            fetched += stats.num_fetched
        return x, Loads(jnp.stack(counts), overflow, fetched)

    def _logits(self, params: ServeParams, x_BD: jax.Array) -> jax.Array:
        """Returns the logits [B, U] of the tokens that follow."""
        arch = self.config.architecture
        hidden_BD = nnx.merge(_head(arch), params.head).norm(x_BD)
        tied = arch.tie_word_embeddings
        kernel = params.embed.T if tied else params.head["kernel"]
        return logits_of(hidden_BD[None], kernel)[0]


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


@functools.partial(jax.jit, static_argnames="graph")
def _feed_forward(graph: Any, arrays: Any, x: jax.Array) -> jax.Array:
    """Runs the dense network of a layer."""
    return nnx.merge(graph, arrays).feed_forward(x)


@part_of_layer
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
    with kernels(is_on_gpu):
        y, stats = module.moe(
            module.feed_forward_norm(x),
            tables,
            physical=physical,
            is_padding=is_padding,
        )
    return x + y, stats
