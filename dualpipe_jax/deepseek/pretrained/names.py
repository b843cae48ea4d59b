"""Which published tensor each parameter is, and how its axes are arranged there.

A published matrix is [outputs, inputs], with heads and their channels as one axis, and
every expert is a matrix of its own. Ours is [inputs, outputs], with heads as an axis
and the experts of a layer as one array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np

from dualpipe_jax.deepseek.model import DeepSeekConfig

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter, and the published tensor that it is; of an expert, if it has any.

    Attributes:
      path: keys to the parameter in a layer's tree, or in the head's.
      name: of the tensor, after the prefix of the layer; `{}` stands for the number of
        the expert, whose axis comes first in the parameter.
      inputs: sizes of our first axes, which are one axis there, the last.
      outputs: sizes of the other axes, which are one axis there, the first.
      is_transposed: whether our axes are inputs and outputs, or in the published order.
      swapped: whether the two halves of the inputs change places.
    """

    path: tuple[str, ...]
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_transposed: bool = True
    swapped: bool = False

    @property
    def of_experts(self) -> bool:
        """Whether there is a tensor for each expert."""
        return "{}" in self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The published shape."""
        rows = math.prod(self.outputs)
        return (rows, math.prod(self.inputs)) if self.inputs else (rows,)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Our shape, of one expert."""
        first, second = self._in_order(self.inputs, self.outputs)
        return first + second

    def _in_order(self, inputs, outputs):
        return (inputs, outputs) if self.is_transposed else (outputs, inputs)

    def where(self, index: Index) -> tuple[slice, slice]:
        """Returns the rows and columns that hold a part of our array."""
        of_inputs, of_outputs = self._split(index)
        if self.swapped:
            of_inputs = tuple(slice(0, size) for size in self.inputs)
        return _span(of_outputs, self.outputs), _span(of_inputs, self.inputs)

    def ours(self, published: np.ndarray, index: Index) -> np.ndarray:
        """Arranges what `where` points to as that part of our array."""
        of_inputs, of_outputs = self._split(index)
        if self.swapped:
            published = np.roll(published, self.shape[1] // 2, axis=1)
            inputs = self.inputs
        else:
            inputs = _opened(of_inputs, self.inputs)
            of_inputs = _inside(of_inputs)
        shape = self._in_order(inputs, _opened(of_outputs, self.outputs))
        if self.is_transposed:
            published = published.T
        first, second = self._in_order(of_inputs, _inside(of_outputs))
        return published.reshape(shape[0] + shape[1])[first + second]

    def published(self, own: np.ndarray) -> np.ndarray:
        """Arranges our array as it is published."""
        if self.is_transposed:
            own = own.reshape(math.prod(self.inputs), -1).T
        own = own.reshape(self.shape)
        if self.swapped:
            own = np.roll(own, self.shape[1] // 2, axis=1)
        return own

    def _split(self, index: Index) -> tuple[Index, Index]:
        number = len(self.inputs) if self.is_transposed else len(self.outputs)
        first, second = index[:number], index[number:]
        return (first, second) if self.is_transposed else (second, first)


def _span(index: Index, sizes: tuple[int, ...]) -> slice:
    """Returns the range, of axes that are one, that holds a part of them."""
    if not sizes:
        return slice(0, 1)
    below = math.prod(sizes[1:])
    return slice(index[0].start * below, index[0].stop * below)


def _opened(index: Index, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes of the axes of what `_span` points to."""
    return (index[0].stop - index[0].start, *sizes[1:]) if sizes else ()


def _inside(index: Index) -> Index:
    """Returns the part of what `_span` points to."""
    return (slice(None), *index[1:]) if index else ()


def layer_prefix(layer: int) -> str:
    """Returns what the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def layer_parts(config: DeepSeekConfig, *, is_dense: bool) -> Iterator[Part]:
    """Yields the parameters of a layer."""
    c, width = config, (config.hidden_size,)
    heads = (c.num_attention_heads,)
    keys = (*heads, c.qk_head_dim)
    both = (*heads, c.qk_nope_head_dim + c.v_head_dim)
    latent, query = (c.kv_lora_rank,), (c.q_lora_rank or 0,)

    def attention(own: str, name: str, inputs: tuple, outputs: tuple) -> Part:
        path = ("attention", own, "kernel" if inputs else "scale")
        return Part(path, f"self_attn.{name}.weight", inputs, outputs)

    yield Part(("attention_norm", "scale"), "input_layernorm.weight", (), width)
    if c.q_lora_rank is None:
        yield attention("q_up", "q_proj", width, keys)
    else:
        yield attention("q_down", "q_a_proj", width, query)
        yield attention("q_norm", "q_a_layernorm", (), query)
        yield attention("q_up", "q_b_proj", query, keys)
    down = (c.kv_lora_rank + c.qk_rope_head_dim,)
    yield attention("kv_down", "kv_a_proj_with_mqa", width, down)
    yield attention("kv_norm", "kv_a_layernorm", (), latent)
    yield attention("kv_up", "kv_b_proj", latent, both)
    yield attention("out", "o_proj", (*heads, c.v_head_dim), width)
    name = "post_attention_layernorm.weight"
    yield Part(("feed_forward_norm", "scale"), name, (), width)
    if is_dense:
        yield from _network(("dense",), "mlp", c, c.intermediate_size)
        return
    yield Part(("moe", "router"), "mlp.gate.weight", width, (c.n_routed_experts,))
    hidden = c.moe_intermediate_size
    yield from _network(("moe", "experts"), "mlp.experts.{}", c, hidden)
    if c.n_shared_experts:
        # One wide expert there, too.
        wide = hidden * c.n_shared_experts
        yield from _network(("moe", "shared"), "mlp.shared_experts", c, wide)


def _network(
    path: tuple[str, ...], name: str, config: DeepSeekConfig, hidden: int
) -> Iterator[Part]:
    """Yields the matrices of a gated network."""
    # Shared experts have an axis of one.
    lead = (1,) if path[-1] == "shared" else ()
    kernel = ("kernel",) if path[-1] == "dense" else ()
    width, inner = config.hidden_size, hidden
    for own, into, out in (
        ("gate", width, inner),
        ("up", width, inner),
        ("down", inner, width),
    ):
        full = f"{name}.{own}_proj.weight"
        yield Part((*path, own, *kernel), full, (*lead, into), (out,))


# Of a router; a buffer there, and no parameter here either.
BIAS = "mlp.gate.e_score_correction_bias"


def mtp_parts(config: DeepSeekConfig) -> Iterator[Part]:
    """Yields the parameters of the multi-token prediction module, beside its layer."""
    width = (config.hidden_size,)
    for own, name in (
        ("hidden_norm", "hnorm"),
        ("token_norm", "enorm"),
        ("norm", "shared_head.norm"),
    ):
        yield Part((own, "scale"), f"{name}.weight", (), width)
    # There the token's embedding comes first.
    both = (2 * config.hidden_size,)
    yield Part(("project",), "eh_proj.weight", both, width, swapped=True)


def embed_part(config: DeepSeekConfig) -> Part:
    """Returns the embedding."""
    outputs, inputs = (config.vocab_size,), (config.hidden_size,)
    name = "model.embed_tokens.weight"
    return Part((), name, inputs, outputs, is_transposed=False)


def head_parts(config: DeepSeekConfig) -> Iterator[Part]:
    """Yields the parameters of the head, without multi-token prediction."""
    width = (config.hidden_size,)
    yield Part(("norm", "scale"), "model.norm.weight", (), width)
    if not config.tie_word_embeddings:
        yield Part(("kernel",), "lm_head.weight", width, (config.vocab_size,))


def copies(config: DeepSeekConfig) -> dict[str, str]:
    """Returns the tensors that a folder may hold a second time: name -> the other's.

    They are not read; they are written where the folder that was read had them.
    """
    embed = embed_part(config).name
    head = embed if config.tie_word_embeddings else "lm_head.weight"
    found = {"lm_head.weight": embed} if config.tie_word_embeddings else {}
    if config.num_nextn_predict_layers:
        prefix = layer_prefix(config.num_hidden_layers)
        found[f"{prefix}embed_tokens.weight"] = embed
        found[f"{prefix}shared_head.head.weight"] = head
    return found


def published_shapes(config: DeepSeekConfig) -> dict[str, tuple[int, ...]]:
    """Returns the published shapes of all tensors that are read, in model order."""
    found = {}

    def add(prefix: str, parts: Iterable[Part]) -> None:
        for part in parts:
            experts = range(config.n_routed_experts) if part.of_experts else (0,)
            for expert in experts:
                found[prefix + part.name.format(expert)] = part.shape

    add("", [embed_part(config)])
    num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    for layer in range(num_layers):
        is_dense = config.is_dense(layer) and layer < config.num_hidden_layers
        add(layer_prefix(layer), layer_parts(config, is_dense=is_dense))
        if config.has_router_bias and not is_dense:
            found[layer_prefix(layer) + BIAS] = (config.n_routed_experts,)
    if config.num_nextn_predict_layers:
        add(layer_prefix(config.num_hidden_layers), mtp_parts(config))
    add("", head_parts(config))
    return found
