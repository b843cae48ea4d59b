"""What a server runs: which model, on how many devices, with how much work on each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from jax.sharding import Mesh

from dualpipe_jax.deepseek.model import DeepSeekConfig
from eplb_jax import ExpertBalancer, ExpertParallel, lookup, moving_average
from eplb_jax.layer import Payload, Route

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RebalanceConfig:
    """When and how far the placement follows the load; see `eplb_jax.ExpertBalancer`.

    Attributes:
      every: decode steps from one plan to the next.
      layers_per_plan: layers that one plan may change; None: all.
      max_moves: slots of a layer that it may change; None: a twelfth.
      below: balancedness under which a layer is planned anew.
      min_gain: in balancedness, for which it is changed.
      decay: of the moving average of the load, a step.
    """

    every: int = 100
    layers_per_plan: int | None = None
    max_moves: int | None = None
    below: float = 0.95
    min_gain: float = 0.01
    decay: float = 0.9

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"{self.every=} must be at least 1 step.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A server without a pipeline: experts over all devices, all else on each.

    Requests belong to devices. Each has one slot of the cache, and the slots are
    halved: decoding, the halves are the two microbatches that overlap; the prompts of
    a prefill are halved anew each time.

    Attributes:
      name: for reports.
      architecture: the model.
      phase: which of its two steps a report is about: `"prefill"` computes whole
        prompts, `"decode"` one token a request.
      compute_dtype: of activations, of the cache, and of all weights but the routers'.
      num_devices: of the `ep` axis.
      num_nodes: nodes that they are divided among.
      num_redundant: slots of a layer beyond one an expert.
      requests_per_device: slots of the cache; even.
      context_length: tokens of a request, its prompt and what is written.
      prompts_per_device: prompts of one prefill; even.
      prompt_length: tokens of a prompt at most; None: `context_length`.
      prefill_tokens: of one prefill on a device, even; None: as many as
        `prompts_per_device` of the longest ones have.
      route: see `eplb_jax.ExpertParallel`.
      payload: see `eplb_jax.layer.dispatch.send`.
      buffer_factor: see `DeepSeek`; what finds no room counts as zero. None: nothing
        is ever lost.
      rebalance: None: experts stay where they are.
      platform: what jax runs on, as in `TrainConfig`; None: what it finds.

    Raises:
      ValueError: sizes that do not fit each other.

    Examples:
      >>> from configs import profiles
      >>> profiles.prefill().tokens_per_device, profiles.decode().tokens_per_device
      (16384, 128)
    """

    name: str
    architecture: DeepSeekConfig
    phase: Phase = "decode"
    compute_dtype: str = "float32"
    num_devices: int
    num_nodes: int = 1
    num_redundant: int = 0
    requests_per_device: int
    context_length: int
    prompts_per_device: int = 2
    prompt_length: int | None = None
    prefill_tokens: int | None = None
    route: Route = "direct"
    payload: Payload = "plain"
    buffer_factor: float | None = None
    rebalance: RebalanceConfig | None = dataclasses.field(
        default_factory=RebalanceConfig
    )
    platform: str | None = None

    def __post_init__(self):
        for name, kind in (("phase", Phase), ("route", Route), ("payload", Payload)):
            if getattr(self, name) not in get_args(kind):
                known = " or ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name}={getattr(self, name)!r} must be {known}.")
        if self.payload == "fp8" and self.architecture.hidden_size % 128:
            raise ValueError(
                f"payload='fp8' scales tiles of 128 channels, which do not divide "
                f"dim={self.architecture.hidden_size}; use payload='plain'."
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"{self.compute_dtype=} must be 'float32' or 'bfloat16'.")
        for name in ("num_devices", "num_nodes", "context_length", "max_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_devices % self.num_nodes:
            raise ValueError(f"{self.num_nodes=} must divide {self.num_devices=}.")
        if self.num_slots % self.num_devices:
            raise ValueError(
                f"num_experts + num_redundant = {self.num_slots} must be a multiple "
                f"of {self.num_devices=}."
            )
        for name in ("requests_per_device", "prompts_per_device", "tokens_a_prefill"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise ValueError(f"{name}={value} must be even, for two microbatches.")
        if self.max_prompt > self.context_length:
            raise ValueError(
                f"{self.prompt_length=} must be at most {self.context_length=}."
            )
        if not self.num_moe_layers:
            raise ValueError("the model has no MoE layer: no experts to serve.")
        if self.tokens_a_prefill < self.max_prompt:
            raise ValueError(
                f"{self.prefill_tokens=} must be at least prompt_length="
                f"{self.max_prompt}, so that every prompt fits into one prefill."
            )
        self.balancer  # noqa: B018  so that what does not fit is refused now

    @property
    def num_slots(self) -> int:
        """Slots of a layer."""
        return self.architecture.n_routed_experts + self.num_redundant

    @property
    def num_moe_layers(self) -> int:
        """MoE layers; the multi-token prediction module does not serve."""
        return self.architecture.num_moe_layers

    @property
    def max_prompt(self) -> int:
        """Tokens of a prompt at most."""
        return self.context_length if self.prompt_length is None else self.prompt_length

    @property
    def tokens_a_prefill(self) -> int:
        """Tokens that one prefill computes on a device."""
        if self.prefill_tokens is None:
            return self.prompts_per_device * self.max_prompt
        return self.prefill_tokens

    @property
    def tokens_per_device(self) -> int:
        """Tokens that one step of `phase` computes on a device."""
        decoded = self.requests_per_device
        return self.tokens_a_prefill if self.phase == "prefill" else decoded

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Sizes of the mesh's axes."""
        return {"ep": self.num_devices}

    def lower_step(self, mesh: Mesh) -> Any:
        """The step that `phase` names, lowered for the devices of a mesh."""
        return lookup.find("dualpipe_jax.deepseek.serve.steps:lower_step")(self, mesh)

    @property
    def axis_name(self) -> str | None:
        """Of the mesh; None on one device, which exchanges nothing."""
        return "ep" if self.num_devices > 1 else None

    @property
    def latent_width(self) -> int:
        """Numbers that the cache keeps of a token in a layer."""
        return self.architecture.kv_lora_rank + self.architecture.qk_rope_head_dim

    @property
    def balancer(self) -> ExpertBalancer:
        """Of all MoE layers."""
        plan = self.rebalance or RebalanceConfig()
        return ExpertBalancer(
            num_layers=self.num_moe_layers,
            num_experts=self.architecture.n_routed_experts,
            num_slots=self.num_slots,
            num_devices=self.num_devices,
            estimator=moving_average(plan.decay),
            layers_per_plan=plan.layers_per_plan,
            max_moves=plan.max_moves,
            below=plan.below,
            min_gain=plan.min_gain,
        )

    def parallel(self, num_tokens: int) -> ExpertParallel:
        """How experts are divided, for microbatches of so many tokens a device."""
        num_rows = None
        if self.buffer_factor is not None:
            mean = num_tokens * self.architecture.num_experts_per_tok
            num_rows = math.ceil(self.buffer_factor * mean)
        return ExpertParallel(
            axis_name=self.axis_name,
            num_devices=self.num_devices,
            num_nodes=self.num_nodes,
            num_rows=num_rows,
            payload=self.payload,
            weigh="tokens",
            route=self.route,
        )
