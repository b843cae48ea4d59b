"""The sizes of a DeepSeek-V3-style model, and what follows from them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from dualpipe_jax.checked import Count, Range, Size, check_fields
from dualpipe_jax.deepseek.model.published import CONFIG_FILE, fields_of, read_config
from dualpipe_jax.deepseek.model.rope import Positive, RopeScaling

# Beyond any model; dividing the layers over stages takes a time quadratic in them, and
# the tables of placements have a row for each.
NumLayers = Annotated[int, Range(1, 4096)]
NumExperts = Annotated[int, Range(1, 65_536)]
# Beyond any machine, and far within what XLA counts in 64 bits.
MAX_PARAMETERS = 2**50
MAX_VALUES = 2**44
# How a router scores experts, and the ways to select some that go with it.
TOPK_METHODS = {"softmax": ("greedy", "group_limited_greedy"), "sigmoid": ("noaux_tc",)}


class ParameterCount(NamedTuple):
    """How many parameters a model has.

    Attributes:
      total: all, except those of the multi-token prediction module.
      active: those used for one token: all but the routed experts that it is not sent
        to. As in DeepSeek's own count, the embedding is included.
      mtp: those of the multi-token prediction module alone.
    """

    total: int
    active: int
    mtp: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekConfig:
    """The architecture of DeepSeek-V3 (arXiv:2412.19437, section 2), at any size.

    With other values than the defaults also that of DeepSeek-V2 (arXiv:2405.04434).
    Fields are named as in the `config.json` of DeepSeek's published models.

    Attributes:
      vocab_size: tokens of the vocabulary; 256 for bytes.
      hidden_size: width of the residual stream.
      num_hidden_layers: transformer layers.
      first_k_dense_replace: how many of them, at the start, have a dense feed-forward
        network instead of experts.
      intermediate_size: width of the dense networks.
      num_attention_heads: attention heads.
      q_lora_rank: rank of the queries' compression; None: queries are not compressed.
      kv_lora_rank: rank of the latent that keys and values come from.
      qk_nope_head_dim: width of a head's query and key without a position.
      qk_rope_head_dim: width of a head's query and key with one; even.
      v_head_dim: width of a head's value.
      n_routed_experts: routed experts of a layer.
      moe_intermediate_size: width of an expert.
      num_experts_per_tok: routed experts per token, k.
      n_shared_experts: experts that every token goes to.
      n_group: groups of experts that the router chooses among.
      topk_group: groups that a token's experts may be in.
      scoring_func: `"sigmoid"` scores each expert for itself, as V3 does; `"softmax"`
        against the others, as V2 does.
      topk_method: `"noaux_tc"`, of sigmoid scores: the groups whose best two experts
        score highest, then their best experts, all with the bias that balances loads.
        Of softmax scores: `"greedy"`, the best experts, or `"group_limited_greedy"`,
        those of the groups whose best expert scores highest.
      norm_topk_prob: whether the weights of a token's experts are normalized to add up
        to 1; else they are the scores.
      routed_scaling_factor: multiplies the experts' weights, after that.
      rope_theta: base of the rotary positions.
      rope_scaling: stretches them over longer sequences; None: not.
      rms_norm_eps: epsilon of the RMS norms; that of the two inside the attention is
        1e-6, as in DeepSeek's own code.
      initializer_range: standard deviation of the initial values of all matrices.
      tie_word_embeddings: whether the output matrix is the embedding, transposed.
      num_nextn_predict_layers: 1 adds a multi-token prediction module (section 2.2);
        0: none.

    Raises:
      ValueError: sizes that do not fit each other.

    Examples:
      >>> DeepSeekConfig(
      ...     vocab_size=256, hidden_size=64, num_hidden_layers=4,
      ...     first_k_dense_replace=1, intermediate_size=128, num_attention_heads=4,
      ...     kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
      ...     n_routed_experts=8, moe_intermediate_size=32, num_experts_per_tok=2,
      ... ).num_moe_layers
      3
    """

    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: NumLayers
    first_k_dense_replace: Size
    intermediate_size: Count
    num_attention_heads: Count
    q_lora_rank: Count | None = None
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    n_routed_experts: NumExperts
    moe_intermediate_size: Count
    num_experts_per_tok: Count
    n_shared_experts: Size = 1
    n_group: Count = 1
    topk_group: Count = 1
    scoring_func: Literal["softmax", "sigmoid"] = "sigmoid"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: Positive = 1e-6
    initializer_range: Annotated[float, Range(0)] = 0.006
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: Size = 0

    def __post_init__(self):
        check_fields(self)
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"{self.first_k_dense_replace=} must be at most "
                f"{self.num_hidden_layers=}."
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"{self.qk_rope_head_dim=} must be even: positions rotate pairs."
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"{self.num_experts_per_tok=} must be at most {self.n_routed_experts=}."
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"{self.n_group=} must divide {self.n_routed_experts=}.")
        if not self.topk_group <= self.n_group:
            raise ValueError(f"{self.topk_group=} must be at most {self.n_group=}.")
        if self.topk_method not in TOPK_METHODS[self.scoring_func]:
            known = " or ".join(map(repr, TOPK_METHODS[self.scoring_func]))
            raise ValueError(
                f"{self.topk_method=} does not go with {self.scoring_func=}; use "
                f"{known}."
            )
        if self.topk_method == "greedy" and self.n_group > 1:
            raise ValueError(
                f"{self.n_group=} has no meaning with topk_method='greedy'; use "
                "'group_limited_greedy', or no groups."
            )
        if self.num_nextn_predict_layers > 1:
            raise ValueError(
                f"{self.num_nextn_predict_layers=} must be 0 or 1; deeper multi-token "
                "prediction is not implemented."
            )
        if (total := self.count_parameters().total) > MAX_PARAMETERS:
            sizes = {
                name: size for name, size in vars(self).items() if size is not None
            }
            largest = max(
                (name for name, size in sizes.items() if type(size) is int),
                key=sizes.__getitem__,
            )
            raise ValueError(
                f"{largest}={sizes[largest]:,} makes {total:.2g} parameters, more than "
                f"{MAX_PARAMETERS:.2g}; use smaller sizes."
            )

    def check_activations(
        self, num_tokens: int, context_length: int, num_rows: int
    ) -> None:
        """Refuses sizes whose arrays no device could hold, before anything compiles.

        Args:
          num_tokens: of a microbatch on a device.
          context_length: tokens that one of them may attend to.
          num_rows: of a device's buffer for the tokens of its experts.

        Raises:
          ValueError: an array would have more than `MAX_VALUES` numbers.
        """
        heads = self.num_attention_heads
        head = max(self.qk_nope_head_dim + self.v_head_dim, self.qk_head_dim)
        for what, size in (
            (f"{context_length=} with {heads} heads", heads * context_length),
            (f"heads of {head} numbers", heads * head),
            (f"{self.vocab_size=}", self.vocab_size),
            (f"{self.intermediate_size=}", self.intermediate_size),
            (f"{self.hidden_size=}", self.hidden_size),
        ):
            if num_tokens * size > MAX_VALUES:
                raise ValueError(
                    f"num_tokens={num_tokens:,} of a microbatch on a device, and {what}"
                    f", make an array of {num_tokens * size:.2g} numbers, more than "
                    f"{MAX_VALUES:.2g}; use smaller sizes, or more devices."
                )
        width = max(self.hidden_size, 2 * self.moe_intermediate_size)
        if num_rows * width > MAX_VALUES:
            raise ValueError(
                f"num_rows={num_rows:,} of {width:,} numbers that may arrive at a "
                f"device's experts are more than {MAX_VALUES:.2g} numbers; use smaller "
                "sizes, or a buffer_factor."
            )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> DeepSeekConfig:
        """Reads the `config.json` of a published model.

        DeepSeek-V2, V2-Lite, V3 and R1, and models of the same code, such as Moonlight
        and Kimi K2.

        Args:
          folder: that of a Hugging Face model.

        Raises:
          ValueError: there is no such file, or it names something that is not
            implemented.

        Examples:
          >>> config = DeepSeekConfig.from_pretrained("tests/data/deepseek_v3_fp8")
          >>> config.n_routed_experts, config.rope_scaling.factor
          (4, 4.0)
        """
        config, path = read_config(folder), Path(folder) / CONFIG_FILE
        fields = fields_of(config, path)
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def num_moe_layers(self) -> int:
        """MoE layers, without the one in the multi-token prediction module."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_router_bias(self) -> bool:
        """Whether a bias, which training steps update, affects the selection."""
        return self.topk_method == "noaux_tc"

    @property
    def score_scale(self) -> float:
        """Factor of the attention's scores, beside 1 / sqrt(qk_head_dim)."""
        return 1.0 if self.rope_scaling is None else self.rope_scaling.score_scale

    def is_dense(self, layer: int) -> bool:
        """Whether a layer's feed-forward network is dense."""
        return layer < self.first_k_dense_replace

    def forward_flops(
        self, layer: int, sequence_length: int, matrix_cost: float = 1.0
    ) -> float:
        """Estimated FLOPs of a layer's forward pass for one token.

        Counts matrix products, two FLOPs for each multiply and add, and half the
        sequence for a causal attention. Kernels and links do not all reach the same
        part of their peak; where measured costs exist, use those instead.

        Args:
          layer: index of the layer.
          sequence_length: tokens of a sequence.
          matrix_cost: of an operation with a weight, in those of the attention's
            scores: a half if they are in float8.
        """
        counts = layer_parameters(self)
        weights = counts.attention + (
            counts.dense if self.is_dense(layer) else counts.active_moe
        )
        head = self.qk_head_dim + self.v_head_dim
        mixing = self.num_attention_heads * head * sequence_length / 2
        return 2.0 * (weights * matrix_cost + mixing)

    def head_flops(self, sequence_length: int, matrix_cost: float = 1.0) -> float:
        """Estimated FLOPs of what follows the last layer, for one token.

        That is the output matrix, and with multi-token prediction the module and the
        output matrix again. For the arguments see `forward_flops`; `matrix_cost` is of
        the module's layer alone.
        """
        head = 2.0 * self.hidden_size * self.vocab_size
        if not self.num_nextn_predict_layers:
            return head
        project = 4.0 * self.hidden_size**2
        layer = self.forward_flops(self.num_hidden_layers, sequence_length, matrix_cost)
        return 2 * head + project + layer

    def count_parameters(self) -> ParameterCount:
        """Counts total and active parameters; see `ParameterCount`."""
        layer = layer_parameters(self)
        dense, moe, width = (
            self.first_k_dense_replace,
            self.num_moe_layers,
            self.hidden_size,
        )
        matrices = 1 if self.tie_word_embeddings else 2
        outer = self.vocab_size * width * matrices + width
        each = self.num_hidden_layers * (layer.attention + layer.norms)
        rest = outer + each + dense * layer.dense
        # Two norms of its inputs, one after its layer, and the projection of both
        # inputs to one.
        mtp = layer.attention + layer.norms + layer.moe + 3 * width + 2 * width**2
        return ParameterCount(
            total=rest + moe * layer.moe,
            active=rest + moe * layer.active_moe,
            mtp=mtp if self.num_nextn_predict_layers else 0,
        )


class LayerParameters(NamedTuple):
    """Parameters of the parts of a layer.

    Attributes:
      attention: its matrices and inner norms.
      norms: the norms before the attention and before the feed-forward network.
      dense: a dense feed-forward network.
      moe: router, all routed experts, shared experts.
      active_moe: router, the routed experts of one token, shared experts.
    """

    attention: int
    norms: int
    dense: int
    moe: int
    active_moe: int


def layer_parameters(config: DeepSeekConfig) -> LayerParameters:
    """Counts the parameters of the parts of a layer."""
    c, width, heads = config, config.hidden_size, config.num_attention_heads
    queries = heads * c.qk_head_dim
    if c.q_lora_rank is None:
        query = width * queries
    else:
        query = width * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * queries
    keys = width * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    keys += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    expert = 3 * width * c.moe_intermediate_size
    router, shared = width * c.n_routed_experts, c.n_shared_experts * expert
    return LayerParameters(
        attention=query + keys + heads * c.v_head_dim * width,
        norms=2 * width,
        dense=3 * width * c.intermediate_size,
        moe=router + shared + c.n_routed_experts * expert,
        active_moe=router + shared + c.num_experts_per_tok * expert,
    )
