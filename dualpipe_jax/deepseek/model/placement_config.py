"""How often experts are rebalanced, and their buffers: what both jobs share."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal, Protocol

from dualpipe_jax.checked import Count, Range, check_fields
from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from eplb_jax.layer import Balance
from eplb_jax.placement import Policy

NumRedundant = Annotated[int, Range(0, 65_536)]
ComputeDtype = Literal["float32", "bfloat16"]


def rows_of_buffer(
    buffer_factor: float | None, num_choices: float, num_devices: int
) -> int | None:
    """Rows of a device's buffer for the tokens of its experts; None: for all.

    Args:
      buffer_factor: see `DeepSeek`.
      num_choices: choices of a device's tokens in one microbatch.
      num_devices: as many times `num_choices` are all that can arrive.

    Examples:
      >>> rows_of_buffer(1.5, 33, 4), rows_of_buffer(1e300, 33, 4)
      (50, 132)
    """
    if buffer_factor is None:
        return None
    return math.ceil(min(buffer_factor, num_devices) * num_choices)


class BalanceOptions(Protocol):
    """Options of exact balance; see `eplb_jax.ExpertParallel` and `rows_of_buffer`."""

    @property
    def architecture(self) -> DeepSeekConfig: ...
    @property
    def balance(self) -> Balance: ...
    @property
    def num_fetched(self) -> int: ...
    @property
    def spread_shared(self) -> bool: ...
    @property
    def buffer_factor(self) -> float | None: ...


def check_balance(options: BalanceOptions) -> None:
    """Raises unless options of exact balance fit each other and the model.

    Raises:
      ValueError: naming the option.
    """
    balance, num_fetched = options.balance, options.num_fetched
    spread_shared, buffer_factor = options.spread_shared, options.buffer_factor
    config = options.architecture
    if num_fetched and balance != "exact":
        raise ValueError(
            f"{num_fetched=} needs balance='exact'; {balance=} fetches nothing."
        )
    if spread_shared and balance != "exact":
        raise ValueError(
            f"{spread_shared=} needs balance='exact'; {balance=} plans no rows."
        )
    if spread_shared and config.n_shared_experts != 1:
        raise ValueError(
            f"{spread_shared=} needs a shared expert of the size of the others, but "
            f"n_shared_experts={config.n_shared_experts}; leave it out."
        )
    if num_fetched > config.n_routed_experts:
        raise ValueError(
            f"{num_fetched=} must be at most n_routed_experts="
            f"{config.n_routed_experts}; a few suffice."
        )
    if balance == "exact" and (buffer_factor or 1) < 1:
        raise ValueError(
            f"{buffer_factor=} contradicts balance='exact', by which all devices "
            "compute the mean; leave it out."
        )


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
    """How often experts are rebalanced, and how loads are averaged.

    Attributes:
      every: steps between two placements.
      decay: per step, of the moving average of the loads.
    """

    every: Count
    # 1 would never see a new load.
    decay: Annotated[float, Range(0, 1, below=True)] = dataclasses.field(
        default=0.9, kw_only=True
    )

    def __post_init__(self):
        check_fields(self)


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

    num_redundant: NumRedundant
    num_nodes: Count = 1
    policy: Policy = "auto"
