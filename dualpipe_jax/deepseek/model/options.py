"""How a DeepSeek-V3-style model is trained: options, and the values they may have."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.placement_config import (
    EplbConfig,
    check_buffer_factor,
)
from eplb_jax.layer import Payload

Remat = Literal["attention", "experts"]
StageCode = Literal["shared", "own"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekOptions:
    """The fields of `DeepSeek`; see there."""

    architecture: DeepSeekConfig
    compute_dtype: str = "float32"
    eplb: EplbConfig | None = None
    bias_update_rate: float = 1e-3
    balance_loss: float = 1e-4
    mtp_weight: float = 0.3
    z_loss: float = 0.0
    buffer_factor: float | None = None
    remat: tuple[Remat, ...] = ()
    payload: Payload = "plain"
    layer_costs: tuple[float, ...] | None = None
    head_cost: float | None = None
    rank_speeds: tuple[float, ...] | None = None
    stage_code: StageCode = "shared"
    max_layers: int | None = None

    def __post_init__(self):
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"{self.compute_dtype=} must be 'float32' or 'bfloat16'.")
        check_buffer_factor(self.buffer_factor)
        if unknown := set(self.remat) - set(get_args(Remat)):
            raise ValueError(
                f"remat={self.remat}: {sorted(unknown)[0]!r} is unknown; choose from "
                f"{', '.join(get_args(Remat))}."
            )
        if self.stage_code not in get_args(StageCode):
            raise ValueError(f"{self.stage_code=} must be 'shared' or 'own'.")
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
