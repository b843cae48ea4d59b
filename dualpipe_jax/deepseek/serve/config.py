"""What a server runs: which model, on how many devices, and how much work on each."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import numpy as np
from jax.sharding import Mesh

from dualpipe_jax.checked import INT32_MAX, Count, Range, Size, check_fields
from dualpipe_jax.deepseek.model import (
    MAX_VALUES,
    ComputeDtype,
    DeepSeekConfig,
    NumRedundant,
    PlacementConfig,
    Positive,
    check_balance,
    rows_of_buffer,
)
from dualpipe_jax.deepseek.serve.fetch_costs import break_even
from dualpipe_jax.gpu import Gpu
from dualpipe_jax.train import Platform
from eplb_jax import ExpertBalancer, ExpertParallel, lookup, moving_average
from eplb_jax.layer import Balance, Payload, Products, Route, check_payload

Phase = Literal["prefill", "decode"]
# Each step is divided into two microbatches, which overlap.
HALVES = 2
_Divided = Annotated[int, Range(HALVES, INT32_MAX)]
_Fraction = Annotated[float, Range(0, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RebalanceConfig(PlacementConfig):
    """When and how far the placement follows the load; see `eplb_jax.ExpertBalancer`.

    Attributes:
      every: steps from one plan to the next, of prefills and of decoding together.
      layers_per_plan: most layers that one plan changes; None: all.
      max_moves: most physical experts that one plan changes in a layer; None: a
        twelfth of them.
      below: balancedness under which a new plan is made for a layer.
      min_gain: fraction by which the load of the hottest device must fall for a layer
        to be changed.
      decay: per step, of the moving average of the loads.
    """

    every: Count = 100
    layers_per_plan: Count | None = None
    max_moves: Count | None = None
    below: _Fraction = 0.95
    min_gain: _Fraction = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A server without a pipeline: experts over all devices, all else on each.

    Every request belongs to a device, and has one request slot of its cache. The slots
    of a device are in two halves, whose requests are the two overlapping microbatches
    of a decode step. The prompts of a prefill are divided into halves each time.

    Attributes:
      name: for reports.
      architecture: the model.
      phase: the step that a report is about: `"prefill"` computes whole prompts,
        `"decode"` one token of each request.
      compute_dtype: of activations, of the cache, and of all weights except the
        routers'.
      products: `"fp8"` holds the layers' matrices in float8, with a scale for 128 x 128
        values, and multiplies in float8, see `DeepSeek`. Where decoding absorbs a
        matrix into its attention, it computes in `compute_dtype`.
      num_devices: devices of the `ep` axis.
      num_nodes: nodes that the devices are divided among.
      num_redundant: physical experts of a layer beyond one per expert.
      requests_per_device: request slots of a device's cache; even.
      context_length: most tokens of a request, prompt and completion together.
      prompts_per_device: most prompts of one prefill on a device; even.
      max_prompt_length: most tokens of a prompt; None: `context_length`.
      max_prefill_tokens: most tokens of one prefill on a device; even. None: as many as
        `prompts_per_device` prompts of `max_prompt_length` have. Longer prompts are
        computed in pieces, with decode steps of other requests in between.
      route: see `eplb_jax.ExpertParallel`.
      payload: see `eplb_jax.ExpertParallel`.
      buffer_factor: see `DeepSeek`; choices that exceed a buffer count as zero. None:
        buffers have room for all.
      balance: see `eplb_jax.ExpertParallel`; `"exact"` holds for steps whose microbatch
        has at least `exact_from` tokens on a device.
      num_fetched: experts that a device may fetch for a layer of such a step.
      spread_shared: see `eplb_jax.ExpertParallel`.
      exact_from: None: from `break_even` on, on GPUs that it knows; elsewhere 1.
      rebalance: None: experts are not moved.
      platform: what jax runs on, as in `TrainConfig`; None: what it finds.

    Raises:
      ValueError: sizes that do not fit each other.

    Examples:
      >>> from dualpipe_jax.configs import profiles
      >>> profiles.prefill().tokens_per_device, profiles.decode().tokens_per_device
      (16384, 128)
    """

    name: str
    architecture: DeepSeekConfig
    phase: Phase = "decode"
    compute_dtype: ComputeDtype = "float32"
    products: Products = "plain"
    num_devices: Count
    num_nodes: Count = 1
    num_redundant: NumRedundant = 0
    requests_per_device: _Divided
    context_length: Count
    prompts_per_device: _Divided = 2
    # None stands for a default that depends on other fields; `__post_init__` replaces
    # it, so that the attributes are always numbers.
    max_prompt_length: Count = None  # pyright: ignore[reportAssignmentType]
    max_prefill_tokens: _Divided = None  # pyright: ignore[reportAssignmentType]
    route: Route = "direct"
    payload: Payload = "plain"
    buffer_factor: Positive | None = None
    balance: Balance = "placement"
    num_fetched: Size = 0
    spread_shared: bool = False
    exact_from: Count | None = None
    rebalance: RebalanceConfig | None = dataclasses.field(
        default_factory=RebalanceConfig
    )
    platform: Platform | None = None

    def __post_init__(self):
        check_fields(self)
        self._set_default("max_prompt_length", self.context_length)
        longest = self.prompts_per_device * self.max_prompt_length
        self._set_default("max_prefill_tokens", longest)
        check_fields(self)  # what has just been computed, too
        check_payload(self.payload, self.architecture.hidden_size)
        self._check_sizes()
        if self.products == "fp8" and self.balance == "exact":
            raise ValueError(
                "balance='exact' fetches weights that are not float8 only; use "
                "products='plain' or balance='placement'."
            )
        check_balance(self)
        if self.exact_from is not None and self.balance != "exact":
            raise ValueError(
                f"exact_from={self.exact_from} needs balance='exact'; leave it out."
            )
        self.balancer  # noqa: B018  raises now if sizes do not fit

    def _set_default(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        if self.num_devices % self.num_nodes:
            raise ValueError(f"{self.num_nodes=} must divide {self.num_devices=}.")
        if self.num_physical_experts % self.num_devices:
            raise ValueError(
                f"n_routed_experts + num_redundant = {self.num_physical_experts} must "
                f"be a multiple of {self.num_devices=}."
            )
        for name in ("requests_per_device", "prompts_per_device", "max_prefill_tokens"):
            value = getattr(self, name)
            if value % HALVES:
                raise ValueError(f"{name}={value} must be even, for two microbatches.")
        if self.max_prompt_length > self.context_length:
            raise ValueError(
                f"{self.max_prompt_length=} must be at most {self.context_length=}."
            )
        if not self.num_moe_layers:
            raise ValueError("the model has no MoE layer, so no experts to serve.")
        self._check_arrays()

    def _check_arrays(self) -> None:
        arch = self.architecture
        tokens = max(self.max_prefill_tokens, self.requests_per_device)
        num_rows = self.parallel(tokens).most_rows(tokens * arch.num_experts_per_tok)
        arch.check_activations(tokens, self.context_length, num_rows)
        if self.cache_bytes > 4 * MAX_VALUES:
            raise ValueError(
                f"{self.requests_per_device=} and {self.context_length=} make a cache "
                f"of {self.cache_bytes:.2g} bytes, more than {4 * MAX_VALUES:.2g}; use "
                "smaller sizes."
            )

    @property
    def num_physical_experts(self) -> int:
        """Physical experts of a layer."""
        return self.architecture.n_routed_experts + self.num_redundant

    @property
    def num_request_slots(self) -> int:
        """Requests that run at once, on all devices together."""
        return self.num_devices * self.requests_per_device

    @property
    def has_pieces(self) -> bool:
        """Whether prompts may be too long for one prefill."""
        return self.max_prompt_length > self.max_prefill_tokens

    @property
    def placement_in_order(self) -> np.ndarray:
        """[MoE layers, physical experts]: physical expert i is expert i modulo theirs.

        This is how experts are placed unless the engine is told otherwise.
        """
        expert_X = np.arange(self.num_physical_experts, dtype=np.int32)
        expert_X %= self.architecture.n_routed_experts
        return np.tile(expert_X, (self.num_moe_layers, 1))

    @property
    def num_moe_layers(self) -> int:
        """MoE layers; the multi-token prediction module is not served."""
        return self.architecture.num_moe_layers

    @property
    def tokens_per_device(self) -> int:
        """Tokens that one step of `phase` computes on a device."""
        if self.phase == "prefill":
            return self.max_prefill_tokens
        return self.requests_per_device

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Sizes of the mesh's axes."""
        return {"ep": self.num_devices}

    def lower_step(self, mesh: Mesh) -> Any:
        """Lowers the step that `phase` names for the devices of a mesh."""
        lower = lookup.find("dualpipe_jax.deepseek.serve.programs:lower_step")
        return lower(self, mesh)

    @property
    def axis_name(self) -> str | None:
        """Axis of the mesh; None on one device, where nothing is exchanged."""
        return "ep" if self.num_devices > 1 else None

    @property
    def latent_width(self) -> int:
        """Numbers that the cache keeps for each token and layer."""
        return self.architecture.kv_lora_rank + self.architecture.qk_rope_head_dim

    @property
    def cache_bytes(self) -> int:
        """Bytes of a device's cache."""
        tokens = self.requests_per_device * self.context_length
        size = 2 if self.compute_dtype == "bfloat16" else 4
        return tokens * self.latent_width * self.architecture.num_hidden_layers * size

    @property
    def balancer(self) -> ExpertBalancer:
        """The balancer of all MoE layers."""
        plan = self.rebalance or RebalanceConfig()
        return ExpertBalancer(
            num_layers=self.num_moe_layers,
            num_experts=self.architecture.n_routed_experts,
            num_physical_experts=self.num_physical_experts,
            num_devices=self.num_devices,
            estimator=moving_average(plan.decay),
            layers_per_plan=plan.layers_per_plan,
            max_moves=plan.max_moves,
            below=plan.below,
            min_gain=plan.min_gain,
        )

    def is_exact(self, num_tokens: int, gpu: Gpu | None) -> bool:
        """Whether microbatches of so many tokens on a device are balanced exactly.

        Args:
          num_tokens: of a device.
          gpu: that runs them; None: another device.
        """
        if self.balance != "exact":
            return False
        least = self.exact_from
        if least is None and gpu is not None:
            least = break_even(
                self.architecture, gpu, self.num_devices, payload=self.payload
            )
            return least is not None and num_tokens >= least
        return num_tokens >= (least or 1)

    def parallel(self, num_tokens: int, is_exact: bool = False) -> ExpertParallel:
        """Returns how experts are divided.

        Args:
          num_tokens: of a device in one microbatch.
          is_exact: see the method of that name.
        """
        spread_shared = is_exact and self.spread_shared
        num_choices = num_tokens * (
            self.architecture.num_experts_per_tok + spread_shared
        )
        return ExpertParallel(
            axis_name=self.axis_name,
            num_devices=self.num_devices,
            num_nodes=self.num_nodes,
            num_rows=rows_of_buffer(self.buffer_factor, num_choices, self.num_devices),
            payload=self.payload,
            apply_scores="after",
            route=self.route,
            balance="exact" if is_exact else "placement",
            num_fetched=self.num_fetched if is_exact else 0,
            spread_shared=spread_shared,
        )
