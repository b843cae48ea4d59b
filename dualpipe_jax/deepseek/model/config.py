"""The sizes of a DeepSeek-V3-style model, and what follows from them.

Shape suffixes here and in the modules beside: B batch, T and S sequence, D width of the
residual stream, H heads, N and R width of a head without and with a position, V width
of a head's value, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class ParameterCount(NamedTuple):
    """How many parameters a model has.

    Attributes:
      total: all, without the multi-token prediction module.
      active: those that one token meets: all but the routed experts that it does not
        go to. As in DeepSeek's own count, the embedding is among them.
      mtp: those of the multi-token prediction module alone.
    """

    total: int
    active: int
    mtp: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekConfig:
    """The architecture of DeepSeek-V3 (arXiv:2412.19437, section 2), at any size.

    Attributes:
      vocab_size: tokens; 256 for bytes.
      dim: width of the residual stream.
      num_layers: transformer layers.
      first_k_dense_replace: of these, the first ones have a dense feed-forward network.
      intermediate_size: its width.
      num_heads: attention heads.
      q_lora_rank: rank of the queries' compression; None: queries are not compressed.
      kv_lora_rank: rank of the latent that keys and values come from.
      qk_nope_head_dim: width of a head's query and key without a position.
      qk_rope_head_dim: width of a head's query and key with one; even.
      v_head_dim: width of a head's value.
      num_experts: routed experts of a layer.
      moe_intermediate_size: width of an expert.
      num_experts_per_tok: routed experts a token, k.
      n_shared_experts: experts that every token goes to.
      num_groups: groups of experts that the router chooses among.
      topk_groups: groups that a token's experts may be in.
      route_scale: what the experts' weights, made to add up to 1, are multiplied with.
      rope_theta: of the rotary positions.
      rms_norm_eps: of the RMS norms.
      initializer_range: standard deviation of the first values of all matrices.
      tied: whether the output head is the embedding, transposed.
      mtp: whether there is a multi-token prediction module (section 2.2; depth 1).

    Raises:
      ValueError: sizes that do not fit each other.

    Examples:
      >>> DeepSeekConfig(
      ...     vocab_size=256, dim=64, num_layers=4, first_k_dense_replace=1,
      ...     intermediate_size=128, num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
      ...     v_head_dim=16, num_experts=8, moe_intermediate_size=32, num_experts_per_tok=2,
      ... ).num_moe_layers
      3
    """

    vocab_size: int
    dim: int
    num_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    num_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_experts: int
    moe_intermediate_size: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    num_groups: int = 1
    topk_groups: int = 1
    route_scale: float = 1.0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tied: bool = False
    mtp: bool = False

    def __post_init__(self):
        may_be_zero = {"first_k_dense_replace", "n_shared_experts"}
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in may_be_zero)
            if field.type == "int" and value < least:
                raise ValueError(f"{field.name}={value} must be at least {least}.")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"{self.q_lora_rank=} must be at least 1, or None.")
        if self.first_k_dense_replace > self.num_layers:
            raise ValueError(
                f"{self.first_k_dense_replace=} must be at most {self.num_layers=}."
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"{self.qk_rope_head_dim=} must be even: positions turn pairs."
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"{self.num_experts_per_tok=} must be at most {self.num_experts=}."
            )
        if self.num_experts % self.num_groups:
            raise ValueError(f"{self.num_groups=} must divide {self.num_experts=}.")
        if not self.topk_groups <= self.num_groups:
            raise ValueError(f"{self.topk_groups=} must be at most {self.num_groups=}.")

    @property
    def num_moe_layers(self) -> int:
        """MoE layers, without the one in the multi-token prediction module."""
        return self.num_layers - self.first_k_dense_replace

    @property
    def head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_dense(self, layer: int) -> bool:
        """Whether a layer's feed-forward network is dense."""
        return layer < self.first_k_dense_replace

    def forward_flops(self, layer: int, sequence_length: int) -> float:
        """Estimated FLOPs of a layer's forward pass for one token.

        Matrix products, two FLOPs for each multiply and add, with a causal attention's
        mean of half the sequence. Kernels and links do not all reach one part of their
        peak: give measured costs where you have them.

        Args:
          layer: which one.
          sequence_length: tokens of a sequence.
        """
        counts = layer_parameters(self)
        weights = counts.attention + (
            counts.dense if self.is_dense(layer) else counts.active_moe
        )
        mixing = (
            self.num_heads * (self.head_dim + self.v_head_dim) * sequence_length / 2
        )
        return 2.0 * (weights + mixing)

    def head_flops(self, sequence_length: int) -> float:
        """The same of what stands behind the last layer: the head, twice with MTP."""
        head = 2.0 * self.dim * self.vocab_size
        if not self.mtp:
            return head
        project = 4.0 * self.dim**2
        return 2 * head + project + self.forward_flops(self.num_layers, sequence_length)

    def count_parameters(self) -> ParameterCount:
        """Total and active parameters; see `ParameterCount`."""
        layer = layer_parameters(self)
        dense, moe = self.first_k_dense_replace, self.num_moe_layers
        outer = self.vocab_size * self.dim * (1 if self.tied else 2) + self.dim
        each = self.num_layers * (layer.attention + layer.norms)
        rest = outer + each + dense * layer.dense
        # Two norms of its inputs, one behind, and the projection of both to one.
        mtp = layer.attention + layer.norms + layer.moe + 3 * self.dim + 2 * self.dim**2
        return ParameterCount(
            total=rest + moe * layer.moe,
            active=rest + moe * layer.active_moe,
            mtp=mtp if self.mtp else 0,
        )


class LayerParameters(NamedTuple):
    """Parameters of the parts of a layer.

    Attributes:
      attention: its matrices and inner norms.
      norms: before the attention and before the feed-forward network.
      dense: a dense feed-forward network.
      moe: router, all experts, shared ones.
      active_moe: router, the experts of one token, shared ones.
    """

    attention: int
    norms: int
    dense: int
    moe: int
    active_moe: int


def layer_parameters(config: DeepSeekConfig) -> LayerParameters:
    """Counts the parameters of the parts of a layer."""
    c = config
    queries = c.num_heads * c.head_dim
    if c.q_lora_rank is None:
        query = c.dim * queries
    else:
        query = c.dim * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * queries
    keys = c.dim * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    keys += c.kv_lora_rank * c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
    expert = 3 * c.dim * c.moe_intermediate_size
    router, shared = c.dim * c.num_experts, c.n_shared_experts * expert
    return LayerParameters(
        attention=query + keys + c.num_heads * c.v_head_dim * c.dim,
        norms=2 * c.dim,
        dense=3 * c.dim * c.intermediate_size,
        moe=router + shared + c.num_experts * expert,
        active_moe=router + shared + c.num_experts_per_tok * expert,
    )
