"""How often experts are rebalanced, and their buffers: what both jobs share."""

from __future__ import annotations

import dataclasses
import math

from eplb_jax.placement import Policy, is_count


def check_buffer_factor(buffer_factor: float | None) -> None:
    """Raises ValueError unless a buffer of that many mean loads has rows, or for None.

    Args:
      buffer_factor: see `DeepSeek`.

    Raises:
      ValueError: if it is not positive and finite.

    Examples:
      >>> check_buffer_factor(0.0)
      Traceback (most recent call last):
        ...
      ValueError: buffer_factor=0.0 must be positive and finite; 1.25 leaves room ...
    """
    if buffer_factor is not None and not 0 < buffer_factor < math.inf:
        raise ValueError(
            f"{buffer_factor=} must be positive and finite; 1.25 leaves room for a "
            "quarter more than the mean, and None for all that can arrive."
        )


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
        if not is_count(self.every):
            raise ValueError(f"{self.every=} must be at least 1 step, an int.")
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
        if self.num_redundant != 0 and not is_count(self.num_redundant):
            raise ValueError(f"{self.num_redundant=} must be at least 0, an int.")
        if not is_count(self.num_nodes):
            raise ValueError(f"{self.num_nodes=} must be at least 1, an int.")
