"""The attention of a layer: over prompts or pieces of them, and over the cache.

Shape suffixes: see `dualpipe_jax.deepseek`; here Q the longest piece of a prompt.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dualpipe_jax.deepseek.serve.arrays import Prompts
from dualpipe_jax.deepseek.serve.config import HALVES
from dualpipe_jax.deepseek.serve.rows import Rows, place_in_half, start_and_stop
from eplb_jax.products import cross_compiling

# The parts of a layer are functions of their own so that layers of one structure are
# traced, and lowered, once.
part_of_layer = functools.partial(jax.jit, static_argnames=("graph", "is_on_gpu"))


class Handed(NamedTuple):
    """What one microbatch of a prefill hands to the next.

    Attributes:
      latents: for each layer [T, W], of the last row; or of one layer.
      request_slot: [] int32, of the last row's prompt.
    """

    latents: Any
    request_slot: jax.Array

    def row(self, layer: int) -> Handed:
        """Returns that of one layer."""
        return self._replace(latents=self.latents[layer])


class Pieces(NamedTuple):
    """Where the pieces of prompts are, whose beginnings are in the cache.

    Attributes:
      rows: of the pieces alone, of Q places each; only queries run on these.
      position_BQ: positions of the places.
      request_slots: [B] int32, on the device.
      place_HB: [halves, B] int32, row of each prompt in the caches; out of range if it
        is in the other half, or if there is none.
    """

    rows: Rows
    position_BQ: jax.Array
    request_slots: jax.Array
    place_HB: jax.Array

    @classmethod
    def of(cls, prompts: Prompts, requests_per_device: int) -> Pieces:
        """Returns those of a microbatch."""
        num_tokens, slots = len(prompts.tokens), prompts.request_slots
        start_B, _ = start_and_stop(prompts)
        return cls(
            Rows.of(prompts, num_tokens, start_B),
            start_B[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None],
            slots,
            jnp.stack(
                [
                    place_in_half(slots, half, requests_per_device)
                    for half in range(HALVES)
                ]
            ),
        )

    def cached(self, caches: list[jax.Array], num_positions: int) -> jax.Array:
        """Returns the first latents [B, T, W] of the prompts' rows in the caches."""
        found = [
            cache.at[place_B, :num_positions].get(
                mode="fill", fill_value=0, wrap_negative_indices=False
            )
            for cache, place_B in zip(caches, self.place_HB, strict=True)
        ]
        return found[0] + found[1]  # one of them is 0


@part_of_layer
def attend_in_prompts(
    graph: Any,
    is_on_gpu: bool,
    arrays: Any,
    x_MD: jax.Array,
    position_M: jax.Array,
    rows: Rows,
    handed: Handed | None,
    caches: list[jax.Array] | None,
    pieces: Pieces | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the attention of a layer over prompts; see `Forward.prefill`.

    Args:
      graph: of the layer.
      is_on_gpu: see `Forward`.
      arrays: of the layer.
      x_MD: its input.
      position_M: positions of the tokens.
      rows: of whole prompts.
      handed: of this layer, or None.
      caches: both halves of this layer; None: there are no pieces.
      pieces: where the pieces are, then.

    Returns:
      The layer's state, the latents [M, W] of all tokens, and those [T, W] of the last
      row.
    """
    module = nnx.merge(graph, arrays)
    attention, c = module.attention, module.attention.config
    with jax.named_scope("attn"), kernels(is_on_gpu):
        x_1MD = attention.operand(module.attention_norm(x_MD)[None])
        pair = attention.latents(x_1MD, position_M[None])
        latent_MW = jnp.concatenate(pair, axis=-1)[0]
        kept_BTW = rows.spread(latent_MW)
        if pieces is not None and caches is not None:
            cached_BTW = pieces.cached(caches, kept_BTW.shape[1])
            kept_BTW = jnp.where(rows.is_token_BT[..., None], kept_BTW, cached_BTW)
        if handed is not None:
            is_given_T1 = ~rows.is_token_BT[0][:, None]
            if pieces is not None:
                is_given_T1 &= pieces.request_slots[0] == handed.request_slot
            first_TW = jnp.where(is_given_T1, handed.latents, kept_BTW[0])
            kept_BTW = kept_BTW.at[0].set(first_TW)
        asking = rows if pieces is None else pieces.rows
        position_BT = rows.position_BT if pieces is None else pieces.position_BQ
        compressed = jax.tree.map(
            lambda leaf_1M: asking.spread(leaf_1M[0]), attention.compress(x_1MD)
        )
        q_BTHK = attention.queries(compressed, position_BT)
        latent_BTC, rope_BTR = jnp.split(kept_BTW, [c.kv_lora_rank], axis=-1)
        v_BTHV = attention.mix(
            q_BTHK, latent_BTC, rope_BTR, None if pieces is None else position_BT
        )
        x_MD = x_MD + attention.output(asking.gather(v_BTHV))
    return x_MD, latent_MW, kept_BTW[-1]


@part_of_layer
def attend_to_cache(
    graph: Any,
    is_on_gpu: bool,
    arrays: Any,
    x_BD: jax.Array,
    position_B: jax.Array,
    cache_BSW: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the attention of a layer for one token of each request."""
    module = nnx.merge(graph, arrays)
    with jax.named_scope("attn"), kernels(is_on_gpu):
        y_BD, cache_BSW = module.attention.decode(
            module.attention_norm(x_BD), position_B, cache_BSW
        )
        return x_BD + y_BD, cache_BSW


def kernels(is_on_gpu: bool) -> contextlib.AbstractContextManager[None]:
    """Enables kernels for GPUs, which may only be compiled for."""
    return cross_compiling() if is_on_gpu else contextlib.nullcontext()
