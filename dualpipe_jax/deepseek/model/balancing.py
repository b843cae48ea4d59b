"""Expert load in training: the router's bias, the load estimate and the placement.

All of it is in model order, one row an MoE layer, so that no checkpoint depends on how
layers are laid over stages.

Shape suffixes: L MoE layers, E experts, S slots, G stages, D devices of the `ep` axis.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from eplb_jax import (
    ExpertTables,
    balancedness,
    moving_average,
    physical_weights,
    rebalance_experts,
    update_bias,
)
from eplb_jax.placement import Policy

P = PartitionSpec
PyTree = Any


@dataclasses.dataclass(frozen=True)
class EplbConfig:
    """Redundant experts in training, and how often they are placed anew.

    Attributes:
      every: steps between two placements.
      num_redundant: slots of a layer beyond one an expert, over all devices.
      num_nodes: nodes that the devices of the `ep` axis are divided among.
      policy: see `eplb_jax.rebalance_experts`; a node gets whole groups of experts
        under `"hierarchical"`.
      decay: of the moving average of the load, a step.
    """

    every: int
    num_redundant: int
    num_nodes: int = 1
    policy: Policy = "auto"
    decay: float = 0.9

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"{self.every=} must be at least 1 step.")
        if self.num_redundant < 0:
            raise ValueError(f"{self.num_redundant=} must be at least 0.")


class RouterState(NamedTuple):
    """What steps change beside the parameters.

    Attributes:
      bias: [layers, experts] float32, see `eplb_jax.layer.moe.RouterBias`.
      loads: of the load estimator.
      placement: [layers, slots] int32, the expert in each slot.
    """

    bias: Any
    loads: Any
    placement: Any


@dataclasses.dataclass(frozen=True)
class Balancer:
    """The router's bias, the load estimate and the placement of all MoE layers.

    Attributes:
      num_layers: MoE layers, those of a multi-token prediction module included.
      num_experts: of a layer.
      num_groups: of the router.
      num_devices: of the `ep` axis.
      bias_update_rate: see `eplb_jax.layer.routing.update_bias`.
      eplb: None: slot i is expert i.
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
            ("num_experts + num_redundant", self.num_slots),
        ):
            if value % self.num_devices:
                raise ValueError(
                    f"{name}={value} must be a multiple of the ep axis, "
                    f"{self.num_devices}, that they are divided over."
                )
        if self.eplb and self.num_devices % self.eplb.num_nodes:
            raise ValueError(
                f"num_nodes={self.eplb.num_nodes} must divide the ep axis, "
                f"{self.num_devices}."
            )

    @property
    def num_slots(self) -> int:
        """Slots of a layer."""
        redundant = self.eplb.num_redundant if self.eplb else 0
        return self.num_experts + redundant

    @property
    def _estimator(self):
        # Loads are seen without EPLB too: what resumes with it knows them.
        return moving_average(self.eplb.decay if self.eplb else EplbConfig.decay)

    def init(self) -> RouterState:
        """No bias, no load seen, and a placement for even loads."""
        shape = (self.num_layers, self.num_experts)
        return RouterState(
            jnp.zeros(shape, jnp.float32),
            self._estimator.init(*shape),
            self.plan(jnp.ones(shape, jnp.float32)),
        )

    def plan(self, loads_LE: jax.Array) -> jax.Array:
        """A placement [layers, slots] for loads [layers, experts]."""
        if self.eplb is None or not self.num_layers:
            return self._in_order(self.num_slots)
        placement = rebalance_experts(
            loads_LE,
            self.num_slots,
            self.num_groups,
            self.eplb.num_nodes,
            self.num_devices,
            policy=self.eplb.policy,
        )
        return placement.physical_to_logical_map

    def _in_order(self, num_slots: int) -> jax.Array:
        """The placement [layers, slots] that knows no loads: slot i has expert i."""
        identity_S = jnp.arange(num_slots, dtype=jnp.int32) % self.num_experts
        return jnp.tile(identity_S[None], (self.num_layers, 1))

    def estimate(self, buffers: RouterState) -> jax.Array:
        """The load [layers, experts] that was seen."""
        return self._estimator.estimate(buffers.loads)

    def replan(self, buffers: RouterState) -> RouterState:
        """The same with a placement for the load that was seen, or for even loads."""
        loads_LE = self.estimate(buffers)
        placement = self.plan(jnp.where(buffers.loads.weight > 0, loads_LE, 1.0))
        return buffers._replace(placement=placement)

    def tables(self, buffers: RouterState) -> ExpertTables | None:
        """The tables of all layers; None where slot i is expert i."""
        if self.eplb is None:
            return None
        return ExpertTables.from_placement(buffers.placement, self.num_experts)

    def observe(
        self, buffers: RouterState, counts_LE: jax.Array, step: jax.Array
    ) -> tuple[RouterState, dict[str, jax.Array]]:
        """After a step: what the next one uses, and what to log.

        Args:
          buffers: of this step.
          counts_LE: [layers, experts] int32, tokens of the step.
          step: from 1.

        Returns:
          The buffers, and `balancedness`: mean over devices over maximum, mean over
          layers, of this step's tokens on the placement that it ran with, and
          `balancedness_layers`, [layers], that of each. With EPLB
          also `balancedness_unplaced`, of the same tokens without any placement, and
          `balancedness_next`, of the estimated load on the next step's placement.
        """
        if not self.num_layers:
            return buffers, {}
        loads = self._estimator.observe(buffers.loads, counts_LE)
        bias = update_bias(buffers.bias, counts_LE, self.bias_update_rate)
        after = RouterState(bias, loads, buffers.placement)

        def measure(loads_LE: jax.Array, placement_LS: jax.Array) -> jax.Array:
            return balancedness(loads_LE, placement_LS, self.num_devices)

        now_L = measure(counts_LE, buffers.placement)
        metrics = {"balancedness": now_L.mean(), "balancedness_layers": now_L}
        if self.eplb is not None:
            estimate_LE = self.estimate(after)
            placement = lax.cond(
                step % self.eplb.every == 0,
                self.plan,
                lambda _: buffers.placement,
                estimate_LE,
            )
            after = after._replace(placement=placement)
            unplaced = self._in_order(self.num_experts)
            metrics["balancedness_unplaced"] = measure(counts_LE, unplaced).mean()
            metrics["balancedness_next"] = measure(estimate_LE, placement).mean()
        return after, metrics


def to_slots(
    experts: PyTree, tables: ExpertTables, mesh: Mesh, leading: str | None
) -> PyTree:
    """Gathers the weights of all slots, once for all microbatches of a step.

    Args:
      experts: pytree, leaves [stages, experts, ...], experts divided over `ep`.
      tables: [stages, ...], of the layer that each stage has here.
      mesh: with the axis `ep`.
      leading: mesh axis of the stages, or None.

    Returns:
      The same with slots in place of experts.
    """

    def gather(experts: PyTree, tables: ExpertTables) -> PyTree:
        return _map_stages(_gather_stage(mesh), experts, tables)

    return _mapped(gather, mesh, leading)(experts, tables)


def from_slots(
    grads: PyTree, tables: ExpertTables, mesh: Mesh, leading: str | None
) -> PyTree:
    """The transpose of `to_slots`: adds the gradients of all replicas of an expert."""
    per_device = tables.num_experts // mesh.shape["ep"]
    gather = _gather_stage(mesh)

    def add_stage(grads: PyTree, tables: ExpertTables) -> PyTree:
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros((per_device, *leaf.shape[1:]), leaf.dtype), grads
        )
        # Linear, so any point will do; XLA drops the gathering of zeros.
        _, pullback = jax.vjp(lambda experts: gather(experts, tables), zeros)
        return pullback(grads)[0]

    def add(grads: PyTree, tables: ExpertTables) -> PyTree:
        return _map_stages(add_stage, grads, tables)

    return _mapped(add, mesh, leading)(grads, tables)


def _gather_stage(mesh: Mesh):
    num_devices = mesh.shape["ep"]

    def gather(experts: PyTree, tables: ExpertTables) -> PyTree:
        return physical_weights(
            experts,
            tables,
            num_devices=num_devices,
            axis_name="ep" if num_devices > 1 else None,
        )

    return gather


def _map_stages(function, trees: PyTree, tables: ExpertTables) -> PyTree:
    """Over a device's few stages, one after the other: collectives know no vmap."""
    results = [
        function(jax.tree.map(lambda leaf, i=i: leaf[i], trees), tables.layer(i))
        for i in range(len(tables.expert_count))
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _mapped(function, mesh: Mesh, leading: str | None):
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(leading, "ep"), P(leading)),
        out_specs=P(leading, "ep"),
        # What differs between devices, and what does not, is plain here.
        check_vma=False,
    )
