"""What a server's programs take and return: weights, state and microbatches.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

P = PartitionSpec
# Most likely tokens that are reported with a token, at most.
MAX_TOP = 20
# An index past the end of any array; negative ones would count from the end.
NOWHERE = 2**31 - 1


class ServeParams(NamedTuple):
    """The weights that a server runs with.

    Attributes:
      embed: [vocabulary, D].
      head: dict of the last norm and, unless it is tied, the output matrix.
      layers: for each layer a dict of its module's parameters, without routed experts.
      experts: for each MoE layer the `ExpertWeights` of its physical experts,
        [physical experts, ...].
    """

    embed: Any
    head: Any
    layers: Any
    experts: Any


# How they are divided over the mesh.
PARAM_SPECS = ServeParams(P(), P(), P(), P("ep"))


class Sampling(NamedTuple):
    """How the next token of each request is chosen.

    Attributes:
      temperature: [B] float32; 0 takes the most likely token.
      seed: [B] int32; a draw depends on the seed and the position, and not on what is
        served together with the request.
      top_p: [B] float32; a draw is from the most likely tokens whose probabilities add
        up to this; 1: from all.
      has_logprobs: [B] bool, whether log probabilities are computed, too.
    """

    temperature: Any
    seed: Any
    top_p: Any
    has_logprobs: Any


class Chosen(NamedTuple):
    """The next tokens of requests, and what the model thought of them.

    Log probabilities are the model's own, before the temperature. They are 0 where no
    request has asked for them. K: as many as `MAX_TOP`, or the vocabulary.

    Attributes:
      tokens: [B] int32.
      logprobs: [B] float32, of these tokens.
      top_tokens: [B, K] int32, the most likely tokens, in order.
      top_logprobs: [B, K] float32, of those.
    """

    tokens: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any


class Prompts(NamedTuple):
    """The tokens of one microbatch of a prefill.

    Attributes:
      tokens: [M] int32.
      positions: [M] int32, position of each token in its prompt.
      rows: [M] int32, row of each token's prompt; -1 for padding.
      request_slots: [B] int32, request slot of each row's prompt; -1 for an empty row.
      last: [B] int32, index of the prompt's last token; -1 if it is not in this
        microbatch.
      sampling: of the rows.
    """

    tokens: Any
    positions: Any
    rows: Any
    request_slots: Any
    last: Any
    sampling: Sampling


class Requests(NamedTuple):
    """One microbatch of a decode step.

    Attributes:
      tokens: [B] int32, the last token of each request.
      positions: [B] int32, positions of these tokens.
      is_idle: [B] bool, whether a request slot is free.
      sampling: of the requests.
    """

    tokens: Any
    positions: Any
    is_idle: Any
    sampling: Sampling


class Loads(NamedTuple):
    """Expert load of a microbatch, of all devices together.

    Attributes:
      tokens_per_expert: [L, E] int32.
      overflow: [] int32, choices that exceeded a buffer.
      num_fetched: [] int32, experts that devices fetched; see `ServeConfig.balance`.
    """

    tokens_per_expert: jax.Array
    overflow: jax.Array
    num_fetched: jax.Array


class ServeState(NamedTuple):
    """What a server keeps between steps, besides its weights.

    Attributes:
      tokens: [2, B] int32, by halves, the last token of each request.
      positions: [2, B] int32, positions of these tokens.
      sampling: [2, B], of the requests.
      caches: for each half and layer, latents [B, positions, W].
      balancer: of all MoE layers.
      overflow: [] int32, expert choices so far that exceeded a buffer; it stays at the
        largest int32.
      num_fetched: [] int32, experts that devices have fetched, likewise.
    """

    tokens: Any
    positions: Any
    sampling: Any
    caches: Any
    balancer: Any
    overflow: Any
    num_fetched: Any
