"""How a DeepSeek-V3-style model is trained: options, and the values they may have."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from dualpipe_jax.checked import Count, Range, Size, check_fields
from dualpipe_jax.deepseek.model.config import DeepSeekConfig, Positive
from dualpipe_jax.deepseek.model.placement_config import (
    ComputeDtype,
    EplbConfig,
    check_balance,
)
from eplb_jax.layer import Balance, Payload, Products, check_payload

Remat = Literal["attention", "experts"]
StageCode = Literal["shared", "own"]
NotNegative = Annotated[float, Range(0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekOptions:
    """The fields of `DeepSeek`; see there."""

    architecture: DeepSeekConfig
    compute_dtype: ComputeDtype = "float32"
    products: Products = "plain"
    eplb: EplbConfig | None = None
    bias_update_rate: NotNegative = 1e-3
    balance_loss: NotNegative = 1e-4
    mtp_weight: NotNegative = 0.3
    z_loss: NotNegative = 0.0
    buffer_factor: Positive | None = None
    remat: tuple[Remat, ...] = ()
    payload: Payload = "plain"
    balance: Balance = "placement"
    num_fetched: Size = 0
    spread_shared: bool = False
    layer_costs: tuple[Positive, ...] | None = None
    head_cost: NotNegative | None = None
    rank_speeds: tuple[Positive, ...] | None = None
    stage_code: StageCode = "shared"
    max_layers: Count | None = None

    def __post_init__(self):
        check_fields(self)
        check_payload(self.payload, self.architecture.hidden_size)
        check_balance(self)
        if (self.layer_costs is None) != (self.head_cost is None):
            raise ValueError(
                "layer_costs and head_cost share a unit; set both or neither."
            )
        costs = self.layer_costs
        num_hidden_layers = self.architecture.num_hidden_layers
        if costs is not None and len(costs) != num_hidden_layers:
            raise ValueError(
                f"layer_costs has {len(costs)} entries, but the model has "
                f"{num_hidden_layers=}; give one cost per layer."
            )
