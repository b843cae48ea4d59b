"""Rebalancing inside a server's jitted step: observe, plan, agree, migrate, switch.

All of it is array arithmetic on a small state, the same on all devices: the host is not
involved, and nothing is recompiled. A plan changes a few physical experts of a few
layers. Their weights are migrated in the step that switches their tables, so every
token is computed with weights that match its tables.

Functions that take or return both weights and state have the weights first.

Shape suffixes: see `eplb_jax`; here P layers of a plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from eplb_jax.layer import Transport
from eplb_jax.placement import (
    ExpertTables,
    add_saturating,
    as_capacity,
    as_loads,
    device_loads,
    is_traced,
    put_like,
)
from eplb_jax.runtime import wait_for
from eplb_jax.serving.agreement import agree
from eplb_jax.serving.migration import migrate
from eplb_jax.serving.planning import (
    choose_tables,
    count_stranded,
    count_vacant,
    make_plan,
    score_layers,
)
from eplb_jax.serving.settings import BalancerSettings
from eplb_jax.serving.state import BalancerState, RebalancePlan, tables_of

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertBalancer(BalancerSettings):
    """When and how far the placement of a running server follows the load.

    A layer is planned if its balancedness, for the estimated load, is below `below`,
    and changed if that gains at least `min_gain`: a steady load causes no moves. What
    is gained is judged at the end of the way that the plan, at most `max_moves` long,
    begins; further plans go on from there. So small plans reach, one after the other,
    what a single large one does.

    If a device has capacity 0, its experts move to other devices at once, regardless of
    `every` and `max_moves`; it must go on serving until it has none left. If a device
    returns, or becomes faster, all layers are planned until they make use of it,
    regardless of `below` and `min_gain`.

    Attributes:
      num_layers: MoE layers.
      num_experts: logical experts of a layer.
      num_physical_experts: physical experts of a layer, over all devices.
      num_devices: must divide the number of physical experts.
      estimator: estimates the load from the counts of steps.
      every: steps from one plan to the next.
      layers_per_plan: most layers that are planned, and change, in one step; the other
        layers take their turn later. None: all.
      max_moves: physical experts of a layer that one plan may change. It bounds the
        bytes that a step sends: weights of `layers_per_plan * max_moves` experts.
        None: a twelfth of the physical experts, and at least two.
      below: see above; 1 plans every layer every time.
      min_gain: see above; the fraction by which the load of the hottest device must
        fall.
      min_gain_per_move: see `refine_placement`.
      max_replicas: width of the tables, see `ExpertTables.from_placement`; no expert
        gets more replicas.

    Raises:
      ValueError: for sizes that do not fit each other.

    Examples:
      Two experts of device 0 have all the load; after two steps device 1 has one:

      >>> balancer = ExpertBalancer(
      ...     num_layers=1, num_experts=4, num_physical_experts=4, num_devices=2)
      >>> @jax.jit
      ... def step(weights, state, counts):
      ...     weights, state, plan = balancer.update(weights, state, counts)
      ...     return weights, state
      >>> state = balancer.init()
      >>> weights = [state.tables.physical_to_logical_map[0, :, None] * 10]
      >>> for _ in range(2):
      ...     weights, state = step(weights, state, jnp.array([[8, 8, 0, 0]]))
      >>> state.tables.physical_to_logical_map.tolist(), weights[0].ravel().tolist()
      ([[2, 1, 0, 3]], [20, 10, 0, 30])
    """

    def init(
        self,
        placement: ArrayLike | None = None,
        *,
        capacity: ArrayLike | None = None,
    ) -> BalancerState:
        """Returns the state of a server that has seen no load.

        Args:
          placement: [layers, physical experts] int32, from `rebalance_experts` for
            recorded loads; None: physical expert s is a replica of expert s modulo
            their number.
          capacity: [devices] relative speeds; None: all equal.

        Returns:
          A `BalancerState`, by whose `tables` the weights must be placed. Put it on the
          mesh, replicated, before the first step.

        Raises:
          ValueError: for a placement of another shape, or without one of the experts.
        """
        shape = (self.num_layers, self.num_physical_experts)
        if placement is None:
            expert_S = np.arange(shape[1], dtype=np.int32) % self.num_experts
            placement = np.tile(expert_S, (self.num_layers, 1))
        if np.shape(placement) != shape:
            raise ValueError(
                f"placement has shape {np.shape(placement)}, but the balancer is for "
                f"[num_layers, num_physical_experts] = {list(shape)}; pass a placement "
                "of this model."
            )
        tables = ExpertTables.from_placement(
            placement, self.num_experts, self.max_replicas
        )
        capacity = self._as_capacity(capacity)
        # Separate arrays: a caller that donates the state must not donate one twice.
        zeros = [jnp.zeros((), jnp.int32) for _ in range(5)]
        step, cursor, num_moves, num_refused, num_rejected = zeros
        return BalancerState(
            loads=self.estimator.init(self.num_layers, self.num_experts),
            tables=tables,
            capacity=capacity,
            is_due=count_vacant(tables.physical_to_logical_map, capacity) > 0,
            step=step,
            cursor=cursor,
            num_moves=num_moves,
            num_refused=num_refused,
            num_rejected=num_rejected,
        )

    def with_capacity(self, state: BalancerState, capacity: ArrayLike) -> BalancerState:
        """Sets the relative speeds of the devices.

        Args:
          state: of the server.
          capacity: [devices] relative speeds; 0 for a device that all experts shall
            leave.

        Returns:
          The state with these capacities.

        Raises:
          ValueError: outside jit, for values that are negative or not finite, and if
            the remaining devices have too few physical experts.

        Examples:
          >>> balancer = ExpertBalancer(
          ...     num_layers=1, num_experts=2, num_physical_experts=4, num_devices=2)
          >>> state = balancer.with_capacity(balancer.init(), [1.0, 0.0])
          >>> balancer.plan(state).tables.physical_to_logical_map.tolist()
          [[0, 1, -1, -1]]
        """
        capacity = self._as_capacity(capacity)
        is_due = state.is_due | (capacity != state.capacity).any()
        if not is_traced(is_due):
            # With the old sharding: another one would recompile the step.
            capacity = put_like(capacity, state.capacity)
            is_due = put_like(is_due, state.is_due)
        return state._replace(capacity=capacity, is_due=is_due)

    def observe(self, state: BalancerState, counts: jax.Array) -> BalancerState:
        """Updates the estimated load with the counts of a step.

        Args:
          state: before the step.
          counts: [layers, experts] tokens that chose each expert, of all devices: see
            `MoEStats.tokens_per_expert`.

        Returns:
          The state after the step.

        Raises:
          ValueError: for counts of another shape.
        """
        loads = self.estimator.observe(state.loads, counts)
        # Of the number, only whether it is zero, and the remainder by `every`, count.
        last = jnp.iinfo(jnp.int32).max // self.every * self.every
        step = jnp.where(state.step >= last, state.step - last, state.step) + 1
        return state._replace(loads=loads, step=step)

    def plan(self, state: BalancerState) -> RebalancePlan:
        """Plans the layers whose turn it is; in most steps nothing changes.

        Args:
          state: of the server.

        Returns:
          A `RebalancePlan`. Computing it takes time only if a plan is due.
        """
        return make_plan(self, state)

    def agree(self, plan: RebalancePlan, axis_name: str) -> RebalancePlan:
        """Returns the plan if all devices have the same, else one without changes.

        Each device plans for itself. If two devices had different plans, outputs would
        be wrong without any error.

        Args:
          plan: of this device.
          axis_name: mesh axis (or axes) of the devices, inside `jax.shard_map`.

        Returns:
          A `RebalancePlan`.
        """
        return agree(plan, axis_name)

    def migrate(
        self,
        weights: Sequence[PyTree],
        state: BalancerState,
        plan: RebalancePlan,
        *,
        axis_name: str | None = None,
        transport: Transport = "auto",
    ) -> list[PyTree]:
        """Moves the weights to where the plan's tables place them.

        Donate the weights to the jitted step, and they change in place. Layers that do
        not change send nothing. See `eplb_jax.migrate`.

        Args:
          weights: for each layer a pytree of [physical experts of this device, ...], by
            `state.tables`. (From one array of all layers, the kernels that read it
            would copy each layer.)
          state: before `switch`.
          plan: of this step.
          axis_name: mesh axis of the devices, inside `jax.shard_map`; None on one
            device, which then has all physical experts.
          transport: see `exchange`.

        Returns:
          A list like `weights`.

        Raises:
          ValueError: for weights of another number of layers.
        """
        if len(weights) != self.num_layers:
            raise ValueError(
                f"weights are of {len(weights)} layers, but the balancer is for "
                f"{self.num_layers}; pass a list of one pytree per layer."
            )

        def change(layer: int, weights: PyTree, before: PyTree) -> PyTree:
            is_it_P = plan.is_changed & (plan.layers == layer)
            row = jnp.argmax(is_it_P)

            def once(_: jax.Array, weights: PyTree) -> PyTree:
                return migrate(
                    weights,
                    state.tables.layer(layer),
                    plan.tables.layer(row),
                    num_devices=1 if axis_name is None else self.num_devices,
                    axis_name=axis_name,
                    transport=transport,
                )

            # A loop of no or one trip: `lax.cond` would copy the weights.
            num_trips = wait_for(is_it_P.any().astype(jnp.int32), before)
            return lax.fori_loop(0, num_trips, once, weights)

        changed: list[PyTree] = []
        for layer, each in enumerate(weights):
            changed.append(change(layer, each, changed[-1:]))
        return changed

    def switch(self, state: BalancerState, plan: RebalancePlan) -> BalancerState:
        """Switches to the plan's tables; the weights must be placed by them.

        Args:
          state: of this step.
          plan: of this step.

        Returns:
          The state of the next step.
        """
        old = tables_of(state, plan.layers)
        new = choose_tables(plan.is_changed, plan.tables, old)
        is_due_P = jnp.where(plan.is_refused, state.is_due[plan.layers], plan.is_due)
        return state._replace(
            tables=jax.tree.map(
                lambda all_L, new_P: all_L.at[plan.layers].set(new_P),
                state.tables,
                new,
            ),
            is_due=state.is_due.at[plan.layers].set(is_due_P),
            cursor=jnp.where(plan.is_refused, state.cursor, plan.cursor),
            num_moves=_count(state.num_moves, plan.num_moves),
            num_refused=_count(state.num_refused, plan.is_refused),
            num_rejected=_count(state.num_rejected, plan.is_rejected),
        )

    def update(
        self,
        weights: Sequence[PyTree],
        state: BalancerState,
        counts: jax.Array,
        *,
        axis_name: str | None = None,
        transport: Transport = "auto",
    ) -> tuple[list[PyTree], BalancerState, RebalancePlan]:
        """Observes and rebalances; call it at the end of a step.

        Args:
          weights: see `migrate`.
          state: of this step.
          counts: see `observe`.
          axis_name: see `migrate`.
          transport: see `exchange`.

        Returns:
          weights: of the next step.
          state: of the next step.
          plan: the plan that was carried out.
        """
        state = self.observe(state, counts)
        return self.rebalance(weights, state, axis_name=axis_name, transport=transport)

    def rebalance(
        self,
        weights: Sequence[PyTree],
        state: BalancerState,
        *,
        axis_name: str | None = None,
        transport: Transport = "auto",
    ) -> tuple[list[PyTree], BalancerState, RebalancePlan]:
        """Plans, agrees, migrates and switches, without observing.

        For servers that rebalance in a separate program, between two steps.

        Args:
          weights: see `migrate`.
          state: see `update`.
          axis_name: see `migrate`.
          transport: see `exchange`.

        Returns:
          See `update`.
        """
        plan = self.plan(state)
        if axis_name is not None:
            plan = self.agree(plan, axis_name)
        weights = self.migrate(
            weights, state, plan, axis_name=axis_name, transport=transport
        )
        return weights, self.switch(state, plan), plan

    def metrics(self, state: BalancerState) -> dict[str, jax.Array]:
        """Computes scalars to log: balancedness of the estimated load, moves, refusals.

        Args:
          state: of the server.

        Returns:
          `balancedness` (mean over layers), `balancedness_worst`, `num_moves`,
          `num_refused`, `num_rejected` (see `BalancerState`), and `num_stranded`, the
          layers that still have experts on a device of capacity 0; their balancedness
          is 0.
        """
        score_L = score_layers(self, state)
        placement_LS = state.tables.physical_to_logical_map
        is_stranded_L = count_stranded(placement_LS, state.capacity) > 0
        return {
            "balancedness": score_L.mean(),
            "balancedness_worst": score_L.min(),
            "num_moves": state.num_moves,
            "num_refused": state.num_refused,
            "num_rejected": state.num_rejected,
            "num_stranded": is_stranded_L.sum(dtype=jnp.int32),
        }

    def layer_metrics(self, state: BalancerState) -> dict[str, jax.Array]:
        """Computes what to show of each layer and device, for the estimated load.

        Args:
          state: of the server.

        Returns:
          `balancedness` [layers], see `metrics`, and `device_loads` [layers, devices],
          the load of each device over the mean; all 0 for a layer without load.
        """
        loads_LE = as_loads(self.estimator.estimate(state.loads))
        placement_LS = state.tables.physical_to_logical_map
        load_LD = device_loads(loads_LE, placement_LS, self.num_devices)
        mean_L1 = load_LD.mean(axis=-1, keepdims=True)
        return {
            "balancedness": score_layers(self, state),
            "device_loads": load_LD / jnp.where(mean_L1 > 0, mean_L1, 1),
        }

    def _as_capacity(self, capacity: ArrayLike | None) -> jax.Array:
        return as_capacity(
            capacity,
            self.num_devices,
            self.num_physical_experts,
            self.num_experts,
            False,
        )


def _count(total: jax.Array, more: jax.Array) -> jax.Array:
    return add_saturating(total, more.sum(dtype=jnp.int32))
