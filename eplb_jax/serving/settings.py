"""The settings of an `ExpertBalancer`: sizes, thresholds and budgets."""

from __future__ import annotations

import dataclasses

from eplb_jax.placement import LoadEstimator, is_count, is_fraction, moving_average


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancerSettings:
    """The fields of `ExpertBalancer`, which documents them.

    Raises:
      ValueError: for sizes that do not fit each other.
    """

    num_layers: int
    num_experts: int
    num_physical_experts: int
    num_devices: int
    estimator: LoadEstimator = dataclasses.field(
        default_factory=lambda: moving_average(0.9)
    )
    every: int = 1
    layers_per_plan: int | None = None
    max_moves: int | None = None
    below: float = 0.95
    min_gain: float = 0.01
    min_gain_per_move: float = 1e-4
    max_replicas: int | None = None

    def __post_init__(self):
        for name in ("num_layers", "num_experts", "num_devices", "every"):
            self._check_count(name)
        self._check_count("num_physical_experts")
        if not isinstance(self.estimator, LoadEstimator):
            raise ValueError(
                f"{self.estimator=} must be a LoadEstimator, such as "
                "moving_average(0.9)."
            )
        if (
            self.num_physical_experts % self.num_devices
            or self.num_physical_experts < self.num_experts
        ):
            raise ValueError(
                f"{self.num_physical_experts=} must be a multiple of "
                f"{self.num_devices=}, and at least {self.num_experts=}."
            )
        if self.layers_per_plan is not None:
            self._check_count("layers_per_plan")
            if self.layers_per_plan > self.num_layers:
                raise ValueError(
                    f"{self.layers_per_plan=} must be between 1 and "
                    f"{self.num_layers=}; None plans all layers."
                )
        if self.max_moves is not None:
            self._check_count("max_moves", "; a swap of two experts is 2")
        if self.max_replicas is not None:
            self._check_count("max_replicas", "; None is always sufficient")
        for name in ("below", "min_gain", "min_gain_per_move"):
            if not is_fraction(getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be in [0, 1], a fraction."
                )

    def _check_count(self, name: str, remedy: str = "") -> None:
        value = getattr(self, name)
        if not is_count(value):
            raise ValueError(
                f"{name}={value!r} must be at least 1, an int below 2**31{remedy}."
            )

    @property
    def plan_size(self) -> int:
        """Layers of one plan."""
        return self.layers_per_plan or self.num_layers

    @property
    def move_budget(self) -> int:
        """Physical experts of a layer that one plan may change."""
        return self.max_moves or max(2, self.num_physical_experts // 12)
