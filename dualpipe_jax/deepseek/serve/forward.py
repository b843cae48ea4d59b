"""The two forward passes of a server: of whole prompts, and of one token a request.

Plain functions of one microbatch, for use inside `jax.shard_map`. Shape suffixes: see
`dualpipe_jax.deepseek.model.config`; here T tokens of a prefill, R rows of it that hold
one prompt each, C positions of a row, B requests, W numbers that a cache keeps of a
token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dualpipe_jax.deepseek.model import Head, Layer, logits_of
from dualpipe_jax.deepseek.serve.config import ServeConfig
from eplb_jax import ExpertTables
from eplb_jax.layer import ONE_DEVICE, cross_compiling
from eplb_jax.placement import take_or_zero

P = PartitionSpec
PyTree = Any
# An index out of any array's range; negative ones would count from behind.
NOWHERE = 2**31 - 1


class ServeParams(NamedTuple):
    """The weights that a server runs with.

    Attributes:
      embed: [vocabulary, D].
      head: dict of the last norm and, unless it is tied, the output matrix.
      layers: for each layer a dict as its module has it, without routed experts.
      experts: for each MoE layer `ExpertWeights` of the slots, [slots, ...].
    """

    embed: Any
    head: Any
    layers: Any
    experts: Any


# How they lie on the mesh.
PARAM_SPECS = ServeParams(P(), P(), P(), P("ep"))


class Sampling(NamedTuple):
    """How the next token of each request is chosen.

    Attributes:
      temperature: [B] float32; 0 takes the likeliest token.
      seed: [B] int32; with the position it decides what is drawn, so that this does not
        depend on what is served beside it.
    """

    temperature: Any
    seed: Any


class Prompts(NamedTuple):
    """The tokens of one microbatch of a prefill.

    Attributes:
      tokens: [T] int32.
      positions: [T] int32, of each in its prompt.
      rows: [T] int32, the row of its prompt; -1 for padding.
      slots: [R] int32, the request whose prompt is in a row; -1 for none.
      last: [R] int32, which token is the prompt's last; -1 where it is not here.
      sampling: of the rows.
    """

    tokens: Any
    positions: Any
    rows: Any
    slots: Any
    last: Any
    sampling: Sampling


class Requests(NamedTuple):
    """One microbatch of a decode step.

    Attributes:
      tokens: [B] int32, the last one of each request.
      positions: [B] int32, theirs.
      is_idle: [B] bool, slots without a request.
      sampling: of the requests.
    """

    tokens: Any
    positions: Any
    is_idle: Any
    sampling: Sampling


class Loads(NamedTuple):
    """What a microbatch asked of the experts, of all devices.

    Attributes:
      counts: [L, E] int32, tokens of each expert.
      overflow: [] int32, choices that found no room.
    """

    counts: jax.Array
    overflow: jax.Array


@dataclasses.dataclass(frozen=True)
class Forward:
    """The model of a server, for microbatches of one size.

    Attributes:
      config: of the server.
      num_tokens: of a microbatch on a device.
      is_on_gpu: whether it is for GPUs, which may only be compiled for.
    """

    config: ServeConfig
    num_tokens: int
    is_on_gpu: bool = False

    @functools.cached_property
    def _graphs(self) -> list[Any]:
        """The structure of each layer's module, without its arrays."""
        arch = self.config.architecture

        def make(dense: bool) -> Layer:
            module = Layer(
                arch, ONE_DEVICE, has_dense=dense, has_moe=not dense, key=_key()
            )
            if module.moe is not None:
                # Only slots are divided over the devices here.
                module.moe.experts = None
                module.moe.parallel = self.config.parallel(self.num_tokens)
            return module

        is_dense = [arch.is_dense(layer) for layer in range(arch.num_hidden_layers)]
        graphs = {
            dense: nnx.graphdef(nnx.eval_shape(functools.partial(make, dense)))
            for dense in set(is_dense)
        }
        return [graphs[dense] for dense in is_dense]

    @functools.cached_property
    def _head(self) -> Any:
        make = functools.partial(Head, self.config.architecture)
        return nnx.graphdef(nnx.eval_shape(lambda: make(_key())))

    def prefill(
        self,
        params: ServeParams,
        tables: ExpertTables,
        prompts: Prompts,
        earlier: list[jax.Array] | None = None,
    ) -> tuple[Any, list[jax.Array]]:
        """Whole prompts, or the two parts of one.

        Args:
          params: of the server.
          tables: of all MoE layers.
          prompts: the microbatch.
          earlier: of the microbatch before, what this one returns as `handed`: its last
            row may be the begin of the prompt whose rest is in row 0.

        Returns:
          outputs: tokens [R] int32 that follow on the prompts whose last token is here,
            latents (for each layer [T, W]), and the `Loads`.
          handed: for each layer [C, W], the latents of the last row.
        """
        layout = _Rows.of(prompts, self.config.max_prompt)
        handed, latents = [], []

        def attend(layer: int, module: Layer, x_TD: jax.Array) -> jax.Array:
            attention, c = module.attention, self.config.architecture
            x_1TD = module.attention_norm(x_TD)[None]
            position_1T = prompts.positions[None]
            pair = attention.latents(x_1TD, position_1T)
            latents.append(jnp.concatenate(pair, axis=-1)[0])
            kept_RCW = layout.spread(latents[-1])
            if earlier is not None:
                first_CW = jnp.where(
                    layout.is_here_RC[0][:, None], kept_RCW[0], earlier[layer]
                )
                kept_RCW = kept_RCW.at[0].set(first_CW)
            handed.append(kept_RCW[-1])
            q_RCHK = attention.queries(
                layout.spread(attention.compress(x_1TD)[0]), layout.position_RC
            )
            latent_RCL, rope_RCR = jnp.split(kept_RCW, [c.kv_lora_rank], axis=-1)
            v_RCHV = attention.mix(q_RCHK, latent_RCL, rope_RCR)
            return attention.out(layout.gather(v_RCHV))

        x_TD, loads = self._layers(
            params, tables, params.embed[prompts.tokens], prompts.rows < 0, attend
        )
        x_RD = take_or_zero(x_TD, prompts.last)
        position_R = take_or_zero(prompts.positions, prompts.last)
        tokens_R = self._next(params, x_RD, position_R, prompts.sampling)
        return (tokens_R, latents, loads), handed

    def decode(
        self,
        params: ServeParams,
        tables: ExpertTables,
        requests: Requests,
        caches: list[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array], Loads]:
        """One token of each request.

        Args:
          params: of the server.
          tables: of all MoE layers.
          requests: the microbatch.
          caches: for each layer [B, positions, W].

        Returns:
          tokens: [B] int32.
          caches: with the latents of the tokens that were given.
          loads: of the experts.
        """
        caches = list(caches)

        def attend(layer: int, module: Layer, x_BD: jax.Array) -> jax.Array:
            y_BD, caches[layer] = module.attention.decode(
                module.attention_norm(x_BD), requests.positions, caches[layer]
            )
            return y_BD

        x_BD, loads = self._layers(
            params, tables, params.embed[requests.tokens], requests.is_idle, attend
        )
        tokens = self._next(params, x_BD, requests.positions, requests.sampling)
        return tokens, caches, loads

    def _layers(
        self,
        params: ServeParams,
        tables: ExpertTables,
        x: jax.Array,
        is_padding,
        attend,
    ) -> tuple[jax.Array, Loads]:
        """All layers; `attend` is given the number of one, its module and its input."""
        counts, overflow, moe = [], jnp.zeros((), jnp.int32), 0
        with cross_compiling() if self.is_on_gpu else contextlib.nullcontext():
            for layer, graph in enumerate(self._graphs):
                module = nnx.merge(graph, params.layers[layer])
                with jax.named_scope("attn"):
                    x = x + attend(layer, module, x)
                normed = module.feed_forward_norm(x)
                if module.dense is not None:
                    x = x + module.dense(normed)
                    continue
                y, stats = module.moe(
                    normed,
                    tables.layer(moe),
                    physical=params.experts[moe],
                    is_padding=is_padding,
                )
                x, moe = x + y, moe + 1
                counts.append(stats.tokens_per_expert)
                overflow += stats.overflow
        return x, Loads(jnp.stack(counts), overflow)

    def _next(
        self, params: ServeParams, x_BD: jax.Array, position_B, sampling: Sampling
    ) -> jax.Array:
        """The tokens [B] after those at these positions."""
        arch = self.config.architecture
        hidden_BD = nnx.merge(self._head, params.head).norm(x_BD)
        kernel = params.embed.T if arch.tie_word_embeddings else params.head["kernel"]
        logits_BV = logits_of(hidden_BD[None], kernel)[0]
        return choose_tokens(logits_BV, position_B + 1, sampling)


def choose_tokens(
    logits_BV: jax.Array, position_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """The likeliest tokens, or tokens drawn at a temperature.

    Args:
      logits_BV: [B, vocabulary] float32.
      position_B: [B] int32, of the tokens to choose.
      sampling: of the requests.

    Returns:
      [B] int32.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.1, 0.9], [0.6, 0.4]]))
      >>> greedy = Sampling(jnp.zeros(2), jnp.zeros(2, jnp.int32))
      >>> choose_tokens(logits, jnp.array([5, 7]), greedy).tolist()
      [1, 0]
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(logits_BV: jax.Array) -> jax.Array:
        def one(logits_V, position, temperature, seed):
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.categorical(key, logits_V / temperature)

        warm_B = sampling.temperature > 0
        temperature_B = jnp.where(warm_B, sampling.temperature, 1.0)
        drawn_B = jax.vmap(one)(logits_BV, position_B, temperature_B, sampling.seed)
        return jnp.where(warm_B, drawn_B.astype(jnp.int32), greedy_B)

    is_any = (sampling.temperature > 0).any()
    return jax.lax.cond(is_any, draw, lambda _: greedy_B, logits_BV)


class _Rows(NamedTuple):
    """Where the tokens of a microbatch stand in rows of one prompt each.

    Only attention runs on rows, which short prompts leave empty in part.

    Attributes:
      token_RC: which token stands there; out of range for none.
      place_T: where each token stands; out of range for padding.
    """

    token_RC: jax.Array
    place_T: jax.Array

    @classmethod
    def of(cls, prompts: Prompts, num_positions: int) -> _Rows:
        num_rows, num_tokens = len(prompts.slots), len(prompts.tokens)
        place_T = prompts.rows * num_positions + prompts.positions
        place_T = jnp.where(prompts.rows < 0, NOWHERE, place_T)
        empty = jnp.full(num_rows * num_positions, num_tokens, jnp.int32)
        token = empty.at[place_T].set(
            jnp.arange(num_tokens, dtype=jnp.int32), mode="drop"
        )
        return cls(token.reshape(num_rows, num_positions), place_T)

    @property
    def is_here_RC(self) -> jax.Array:
        return self.token_RC < len(self.place_T)

    @property
    def position_RC(self) -> jax.Array:
        row_1C = jnp.arange(self.token_RC.shape[1], dtype=jnp.int32)[None]
        return jnp.broadcast_to(row_1C, self.token_RC.shape)

    def spread(self, x_TF: jax.Array) -> jax.Array:
        """Tokens to rows; zeros where there is none."""
        flat = take_or_zero(x_TF, self.token_RC.reshape(-1))
        return flat.reshape(*self.token_RC.shape, *x_TF.shape[1:])

    def gather(self, x_RC: jax.Array) -> jax.Array:
        """Rows to tokens; zeros for padding."""
        return take_or_zero(x_RC.reshape(-1, *x_RC.shape[2:]), self.place_T)


def _key() -> jax.Array:
    """For structures, whose arrays nobody makes."""
    return jax.random.key(0)
