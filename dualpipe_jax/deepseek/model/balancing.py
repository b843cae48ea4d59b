"""Expert load in training: the router's bias, the load estimate and the placement.

All of it is in model order, one row per MoE layer, so that no checkpoint depends on how
layers are laid out over stages. Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax.deepseek.model.placement_config import EplbConfig
from eplb_jax import (
    ExpertTables,
    balancedness,
    moving_average,
    rebalance_experts,
    update_bias,
)
from eplb_jax.placement import choose_policy


class RouterState(NamedTuple):
    """What training steps change besides the parameters.

    Attributes:
      bias: [layers, experts] float32, see `eplb_jax.layer.moe.RouterBias`.
      loads: state of the load estimator.
      placement: [layers, physical experts] int32, the expert of each physical expert.
    """

    bias: Any
    loads: Any
    placement: Any


@dataclasses.dataclass(frozen=True)
class TrainingBalancer:
    """Updates the router's bias, the load estimate and the placement of all MoE layers.

    Attributes:
      num_layers: MoE layers, including that of a multi-token prediction module.
      num_experts: experts of a layer.
      num_groups: groups of experts of the router.
      num_devices: devices of the `ep` axis.
      bias_update_rate: see `eplb_jax.update_bias`.
      eplb: None: physical expert i is expert i.
    """

    num_layers: int
    num_experts: int
    num_groups: int
    num_devices: int
    bias_update_rate: float
    eplb: EplbConfig | None

    def __post_init__(self):
        for name, value in (
            ("num_experts", self.num_experts),
            ("num_experts + num_redundant", self.num_physical_experts),
        ):
            if value % self.num_devices:
                raise ValueError(
                    f"{name}={value} must be a multiple of the ep axis, "
                    f"{self.num_devices}, which experts are divided over."
                )
        if self.eplb and self.num_devices % self.eplb.num_nodes:
            raise ValueError(
                f"num_nodes={self.eplb.num_nodes} must divide the ep axis, "
                f"{self.num_devices}."
            )
        if self.eplb:
            sizes = (self.num_physical_experts, self.num_groups)
            sizes += (self.eplb.num_nodes, self.num_devices)
            choose_policy(self.eplb.policy, None, self.num_experts, sizes)

    @property
    def num_physical_experts(self) -> int:
        """Physical experts of a layer."""
        redundant = self.eplb.num_redundant if self.eplb else 0
        return self.num_experts + redundant

    @property
    def _estimator(self):
        # Loads are observed without EPLB too, so that a run that resumes with it has
        # an estimate.
        return moving_average(self.eplb.decay if self.eplb else EplbConfig.decay)

    def init(self) -> RouterState:
        """Returns no bias, no observed load, and a placement for even loads."""
        shape = (self.num_layers, self.num_experts)
        return RouterState(
            jnp.zeros(shape, jnp.float32),
            self._estimator.init(*shape),
            self.plan(jnp.ones(shape, jnp.float32)),
        )

    def plan(self, loads_LE: jax.Array) -> jax.Array:
        """Returns a placement [layers, physical experts] for the given loads."""
        if self.eplb is None or not self.num_layers:
            return self._in_order(self.num_physical_experts)
        placement = rebalance_experts(
            loads_LE,
            self.num_physical_experts,
            self.num_groups,
            self.eplb.num_nodes,
            self.num_devices,
            policy=self.eplb.policy,
        )
        return placement.physical_to_logical_map

    def _in_order(self, num_physical_experts: int) -> jax.Array:
        """Returns the placement [layers, physical experts] that ignores loads."""
        row_X = jnp.arange(num_physical_experts, dtype=jnp.int32) % self.num_experts
        return jnp.tile(row_X[None], (self.num_layers, 1))

    def estimate(self, state: RouterState) -> jax.Array:
        """Returns the estimated load [layers, experts]."""
        return self._estimator.estimate(state.loads)

    def replan(self, state: RouterState) -> RouterState:
        """Plans a placement for the estimated load; without one, for even loads."""
        loads_LE = self.estimate(state)
        placement = self.plan(jnp.where(state.loads.weight > 0, loads_LE, 1.0))
        return state._replace(placement=placement)

    def tables(self, state: RouterState) -> ExpertTables | None:
        """Returns the tables of all layers; None if physical expert i is expert i."""
        if self.eplb is None:
            return None
        return ExpertTables.from_placement(state.placement, self.num_experts)

    def observe(
        self, state: RouterState, counts_LE: jax.Array, step: jax.Array
    ) -> tuple[RouterState, dict[str, jax.Array]]:
        """Updates the state at the end of a step.

        Args:
          state: of this step.
          counts_LE: [layers, experts] int32, this step's tokens per expert.
          step: number of this step, from 1.

        Returns:
          state: of the next step.
          metrics: `balancedness`, mean over maximum of the devices' loads, averaged
            over layers, for this step's tokens and placement; and
            `balancedness_layers`, [layers], that of each layer. With EPLB also
            `balancedness_unplaced`, for the same tokens with experts in order and no
            replicas, and `balancedness_next`, for the estimated load and the next
            step's placement.
        """
        if not self.num_layers:
            return state, {}
        loads = self._estimator.observe(state.loads, counts_LE)
        bias = update_bias(state.bias, counts_LE, self.bias_update_rate)
        after = RouterState(bias, loads, state.placement)

        def measure(loads_LE: jax.Array, placement_LX: jax.Array) -> jax.Array:
            return balancedness(loads_LE, placement_LX, self.num_devices)

        now_L = measure(counts_LE, state.placement)
        metrics = {"balancedness": now_L.mean(), "balancedness_layers": now_L}
        if self.eplb is not None:
            estimate_LE = self.estimate(after)
            placement = lax.cond(
                step % self.eplb.every == 0,
                self.plan,
                lambda _: state.placement,
                estimate_LE,
            )
            after = after._replace(placement=placement)
            unplaced = self._in_order(self.num_experts)
            metrics["balancedness_unplaced"] = measure(counts_LE, unplaced).mean()
            metrics["balancedness_next"] = measure(estimate_LE, placement).mean()
        return after, metrics
