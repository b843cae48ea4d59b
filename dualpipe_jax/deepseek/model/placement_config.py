"""How often experts are rebalanced: what training and serving share."""

from __future__ import annotations

import dataclasses

from eplb_jax.placement import Policy


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
    """How often experts are rebalanced, and how loads are averaged.

    Attributes:
      every: steps between two placements.
      decay: per step, of the moving average of the loads.
    """

    every: int
    decay: float = dataclasses.field(default=0.9, kw_only=True)

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"{self.every=} must be at least 1 step.")
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"{self.decay=} must be in [0, 1); 1 would never see a new load."
            )


@dataclasses.dataclass(frozen=True)
class EplbConfig(PlacementConfig):
    """Redundant experts in training, and how often experts are rebalanced.

    Attributes:
      every: steps between two placements.
      num_redundant: physical experts of a layer beyond one per expert, over all
        devices.
      num_nodes: nodes that the devices of the `ep` axis are divided among.
      policy: see `eplb_jax.rebalance_experts`; with `"hierarchical"`, whole groups of
        experts are placed on a node.
      decay: per step, of the moving average of the loads.
    """

    num_redundant: int
    num_nodes: int = 1
    policy: Policy = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.num_redundant < 0:
            raise ValueError(f"{self.num_redundant=} must be at least 0.")
