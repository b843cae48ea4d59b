"""Rebalancing inside a server's own jitted step: observe, plan, migrate, switch.

All of it is array arithmetic on a small state, alike on all devices: no host is asked,
and no new program is compiled. A plan changes few slots of few layers; their weights
move in the same step in which their tables switch, so that every token is computed
with weights that match its tables.

Shape suffixes: L layers, E experts, S slots, D devices, N layers of one plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from eplb_jax.layer import Transport
from eplb_jax.placement import (
    ExpertTables,
    LoadEstimator,
    as_capacity,
    balancedness,
    is_traced,
    moving_average,
    refine_placement,
)
from eplb_jax.serving.migration import migrate

PyTree = Any


class BalancerState(NamedTuple):
    """What a server keeps for `ExpertBalancer` from step to step; replicated arrays.

    Attributes:
      loads: of the load estimator.
      tables: [layers, ...], what the weights are placed by.
      capacity: [devices] float32 relative speeds; 0 for a device to be left.
      step: [] int32, steps observed.
      cursor: [] int32, the layer that the next plan considers first.
      num_moves: [] int32, slots whose expert was changed so far.
      num_refused: [] int32, plans that the ranks did not agree on.
    """

    loads: Any
    tables: ExpertTables
    capacity: jax.Array
    step: jax.Array
    cursor: jax.Array
    num_moves: jax.Array
    num_refused: jax.Array


class Plan(NamedTuple):
    """New tables for a few layers.

    Attributes:
      layers: [n] int32, no two alike.
      tables: [n, ...], of these layers; the old ones where nothing changes.
      is_changed: [n] bool, whether the tables are new.
      num_moves: [n] int32, slots whose expert has to be fetched.
      cursor: [] int32, see `BalancerState`.
      is_refused: [] bool, whether the ranks disagreed; then nothing changes.
    """

    layers: jax.Array
    tables: ExpertTables
    is_changed: jax.Array
    num_moves: jax.Array
    cursor: jax.Array
    is_refused: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertBalancer:
    """When and how far the placement of a running server follows the load.

    A layer is planned anew where its balancedness, of the estimated load, is below
    `below`, and changed where that gains at least `min_gain`: a steady load causes no
    moves. Slots on a device of capacity 0 are planned anew in any case, at once and
    whatever they cost; the device must go on serving until it has none left.

    Attributes:
      num_layers: MoE layers.
      num_experts: logical experts of a layer.
      num_slots: slots of a layer, over all devices.
      num_devices: divides the number of slots.
      estimator: of the load, from the counts of steps.
      every: steps from one plan to the next.
      layers_per_plan: at most so many layers are planned, and change, in one step: the
        others' turn comes later. None: all.
      max_moves: slots of a layer that one plan may change, and so the bytes that a step
        moves: `layers_per_plan * max_moves` experts' weights at most. None: a twelfth
        of the slots, and at least two.
      below: see above; 1 plans every layer every time.
      min_gain: see above; a difference of two balancednesses.
      min_gain_per_move: see `refine_placement`.
      max_replicas: width of the tables, see `ExpertTables.from_placement`.

    Raises:
      ValueError: sizes that do not fit each other.

    Examples:
      Two experts of device 0 have all the load; after two steps device 1 has one:

      >>> balancer = ExpertBalancer(
      ...     num_layers=1, num_experts=4, num_slots=4, num_devices=2)
      >>> @jax.jit
      ... def step(state, counts, weights):
      ...     state, weights, plan = balancer.update(state, counts, weights)
      ...     return state, weights
      >>> state = balancer.init()
      >>> weights = [state.tables.physical_to_logical_map[0, :, None] * 10]
      >>> for _ in range(2):
      ...     state, weights = step(state, jnp.array([[8, 8, 0, 0]]), weights)
      >>> state.tables.physical_to_logical_map.tolist(), weights[0].ravel().tolist()
      ([[2, 1, 0, 3]], [20, 10, 0, 30])
    """

    num_layers: int
    num_experts: int
    num_slots: int
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_slots % self.num_devices or self.num_slots < self.num_experts:
            raise ValueError(
                f"{self.num_slots=} must be a multiple of {self.num_devices=}, and at "
                f"least {self.num_experts=}."
            )
        if self.layers_per_plan is not None and not (
            1 <= self.layers_per_plan <= self.num_layers
        ):
            raise ValueError(
                f"{self.layers_per_plan=} must be between 1 and {self.num_layers=}; "
                "None plans all."
            )
        if self.max_moves is not None and self.max_moves < 1:
            raise ValueError(
                f"{self.max_moves=} must be at least 1; a swap of two experts is 2."
            )
        for name in ("below", "min_gain"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be in [0, 1], as balancedness "
                    "is."
                )

    @property
    def _max_moves(self) -> int:
        return self.max_moves or max(2, self.num_slots // 12)

    def init(
        self,
        placement: ArrayLike | None = None,
        *,
        capacity: ArrayLike | None = None,
    ) -> BalancerState:
        """The state of a server that has seen no load.

        Args:
          placement: [layers, slots] int32, of `rebalance_experts` for recorded loads;
            None: slot s has expert s modulo their number.
          capacity: [devices] relative speeds; None: all alike.

        Returns:
          A `BalancerState`. Its `tables` say where the weights have to be. Put it on
          the mesh, replicated, before the first step.

        Raises:
          ValueError: a placement of other sizes, or one that leaves an expert out.
        """
        shape = (self.num_layers, self.num_slots)
        if placement is None:
            row_S = np.arange(self.num_slots, dtype=np.int32) % self.num_experts
            placement = np.tile(row_S, (self.num_layers, 1))
        if np.shape(placement) != shape:
            raise ValueError(
                f"placement has shape {np.shape(placement)}, but the balancer is for "
                f"{shape}, [num_layers, num_slots]: it is another model's."
            )
        # Arrays of their own: who donates the state must not donate one of them twice.
        zeros = [jnp.zeros((), jnp.int32) for _ in range(4)]
        step, cursor, num_moves, num_refused = zeros
        return BalancerState(
            loads=self.estimator.init(self.num_layers, self.num_experts),
            tables=self._tables(jnp.asarray(placement, jnp.int32)),
            capacity=self._capacity(capacity),
            step=step,
            cursor=cursor,
            num_moves=num_moves,
            num_refused=num_refused,
        )

    def with_capacity(self, state: BalancerState, capacity: ArrayLike) -> BalancerState:
        """The state with other speeds of devices.

        Args:
          state: of the server.
          capacity: [devices] relative speeds; 0 for a device that is to be left by all
            experts.

        Raises:
          ValueError: outside jit, for values that are no speeds, and where the devices
            left have too few slots.

        Examples:
          >>> balancer = ExpertBalancer(
          ...     num_layers=1, num_experts=2, num_slots=4, num_devices=2)
          >>> state = balancer.with_capacity(balancer.init(), [1.0, 0.0])
          >>> balancer.plan(state).tables.physical_to_logical_map.tolist()
          [[0, 1, -1, -1]]
        """
        capacity = self._capacity(capacity)
        if not is_traced(capacity) and not is_traced(state.capacity):
            # Where the old ones are: another sharding would compile a step anew.
            capacity = jax.device_put(capacity, state.capacity.sharding)
        return state._replace(capacity=capacity)

    def observe(self, state: BalancerState, counts: jax.Array) -> BalancerState:
        """The state after a step.

        Args:
          state: before it.
          counts: [layers, experts] tokens that chose each expert, of all devices: see
            `MoEStats.tokens_per_expert`.

        Raises:
          ValueError: counts of another shape.
        """
        loads = self.estimator.observe(state.loads, counts)
        return state._replace(loads=loads, step=state.step + 1)

    def plan(self, state: BalancerState) -> Plan:
        """New tables for the layers whose turn it is; of most steps, nothing new.

        It takes time only where something is due.
        """
        score_L, is_stranded_L = self._score(state), self._is_stranded(state)
        is_due = (state.step > 0) & (state.step % self.every == 0)
        is_due &= (score_L < self.below).any()
        is_due |= is_stranded_L.any()
        return lax.cond(
            is_due, self._plan, self._no_plan, state, score_L, is_stranded_L
        )

    def agree(self, plan: Plan, axis_name: str) -> Plan:
        """The plan, if all ranks have the same; else one that changes nothing.

        Ranks that plan for themselves and differ would compute wrong outputs without
        any error.

        Args:
          plan: of this rank.
          axis_name: mesh axis (or axes) of the ranks, inside `jax.shard_map`.

        Returns:
          A `Plan`.
        """
        layer_N = plan.layers.astype(jnp.uint32)
        number = (plan.tables.checksum() * (2 * layer_N + 1)).sum(dtype=jnp.uint32)
        # Reduced as int32: not every backend reduces unsigned integers.
        number = lax.bitcast_convert_type(number, jnp.int32)
        is_same = lax.pmin(number, axis_name) == lax.pmax(number, axis_name)
        return plan._replace(
            is_changed=plan.is_changed & is_same,
            num_moves=jnp.where(is_same, plan.num_moves, 0),
            is_refused=~is_same,
        )

    def migrate(
        self,
        weights: Sequence[PyTree],
        state: BalancerState,
        plan: Plan,
        *,
        axis_name: str | None = None,
        transport: Transport = "auto",
    ) -> list[PyTree]:
        """The weights by the plan's tables; see `eplb_jax.migrate`.

        Donate the weights to the jitted step, and they change in place. Where nothing
        changes, nothing is sent.

        Args:
          weights: for each layer a pytree of [slots of this device, ...], by
            `state.tables`. (One array of all layers would be copied, layer by layer, by
            the kernels that read it.)
          state: before `switch`.
          plan: of this step.
          axis_name: mesh axis of the devices, inside `jax.shard_map`; None on one
            device, which then has all slots.
          transport: see `exchange`.

        Returns:
          List like `weights`.

        Raises:
          ValueError: weights of another number of layers.
        """
        if len(weights) != self.num_layers:
            raise ValueError(
                f"weights are of {len(weights)} layers, but the balancer is for "
                f"{self.num_layers}; give one pytree a layer, in a list."
            )

        def change(layer: int, weights: PyTree) -> PyTree:
            is_it_N = plan.is_changed & (plan.layers == layer)
            row = jnp.argmax(is_it_N)

            def once(_: jax.Array, weights: PyTree) -> PyTree:
                return migrate(
                    weights,
                    state.tables.layer(layer),
                    plan.tables.layer(row),
                    num_devices=1 if axis_name is None else self.num_devices,
                    axis_name=axis_name,
                    transport=transport,
                )

            # A loop and no branch: what a branch leaves alone it copies.
            return lax.fori_loop(0, is_it_N.any().astype(jnp.int32), once, weights)

        return [change(layer, each) for layer, each in enumerate(weights)]

    def switch(self, state: BalancerState, plan: Plan) -> BalancerState:
        """The state with the plan's tables, for weights that are placed by them."""
        rows = _choose(plan.is_changed, plan.tables, _rows(state, plan.layers))
        return state._replace(
            tables=jax.tree.map(
                lambda all_L, new_N: all_L.at[plan.layers].set(new_N),
                state.tables,
                rows,
            ),
            cursor=jnp.where(plan.is_refused, state.cursor, plan.cursor),
            num_moves=state.num_moves + plan.num_moves.sum(dtype=jnp.int32),
            num_refused=state.num_refused + plan.is_refused.astype(jnp.int32),
        )

    def update(
        self,
        state: BalancerState,
        counts: jax.Array,
        weights: Sequence[PyTree],
        *,
        axis_name: str | None = None,
        transport: Transport = "auto",
    ) -> tuple[BalancerState, list[PyTree], Plan]:
        """All of it, at the end of a step: observe, plan, agree, migrate, switch.

        Args:
          state: of this step.
          counts: see `observe`.
          weights: see `migrate`.
          axis_name: see `migrate`.
          transport: see `exchange`.

        Returns:
          state: of the next step.
          weights: of the next step.
          plan: what was done.
        """
        state = self.observe(state, counts)
        return self.rebalance(state, weights, axis_name=axis_name, transport=transport)

    def rebalance(
        self,
        state: BalancerState,
        weights: Sequence[PyTree],
        *,
        axis_name: str | None = None,
        transport: Transport = "auto",
    ) -> tuple[BalancerState, list[PyTree], Plan]:
        """The same without observing: for a program of its own, between two steps.

        Args:
          state: see `update`.
          weights: see `migrate`.
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
        return self.switch(state, plan), weights, plan

    def metrics(self, state: BalancerState) -> dict[str, jax.Array]:
        """Scalars to log: balancedness of the estimated load, moves and refusals."""
        score_L = self._score(state)
        return {
            "balancedness": score_L.mean(),
            "balancedness_worst": score_L.min(),
            "num_moves": state.num_moves,
            "num_refused": state.num_refused,
            "num_stranded": self._is_stranded(state).sum(dtype=jnp.int32),
        }

    def _plan(
        self, state: BalancerState, score_L: jax.Array, is_stranded_L: jax.Array
    ) -> Plan:
        num_layers = self.num_layers
        is_wanted_L = is_stranded_L | (score_L < self.below)
        turn_L = (jnp.arange(num_layers, dtype=jnp.int32) - state.cursor) % num_layers
        class_L = jnp.where(is_stranded_L, 0, jnp.where(is_wanted_L, 1, 2))
        chosen_N = jnp.argsort(class_L * num_layers + turn_L)[: self._plan_size]
        layers_N = chosen_N.astype(jnp.int32)
        is_stranded_N, is_wanted_N = is_stranded_L[layers_N], is_wanted_L[layers_N]
        loads_NE = self.estimator.estimate(state.loads)[layers_N]
        old = _rows(state, layers_N)
        old_NS = old.physical_to_logical_map
        new_NS, _ = refine_placement(
            loads_NE,
            old_NS,
            self.num_devices,
            max_moves=jnp.where(is_stranded_N.any(), self.num_slots, self._max_moves),
            min_gain=self.min_gain_per_move,
            device_capacity=state.capacity,
        )
        gain_N = self._score_of(state, loads_NE, new_NS) - score_L[layers_N]
        is_taken_N = is_wanted_N & (is_stranded_N | (gain_N >= self.min_gain))
        # A placement that leaves an expert out, or does not fit the tables, is none.
        new = self._tables(new_NS)
        tables = _choose(is_taken_N & new.is_valid(), new, old)
        new_NS = tables.physical_to_logical_map
        is_fetched_NS = (new_NS != old_NS) & (new_NS >= 0)
        last = jnp.where(is_wanted_N, turn_L[layers_N], 0).max()
        return Plan(
            layers=layers_N,
            tables=tables,
            is_changed=(new_NS != old_NS).any(axis=1),
            num_moves=is_fetched_NS.sum(axis=1, dtype=jnp.int32),
            cursor=(state.cursor + last + 1) % num_layers,
            is_refused=jnp.zeros((), jnp.bool_),
        )

    def _no_plan(self, state: BalancerState, *scores: jax.Array) -> Plan:
        del scores
        layers_N = jnp.arange(self._plan_size, dtype=jnp.int32)
        return Plan(
            layers=layers_N,
            tables=_rows(state, layers_N),
            is_changed=jnp.zeros(self._plan_size, jnp.bool_),
            num_moves=jnp.zeros(self._plan_size, jnp.int32),
            cursor=state.cursor,
            is_refused=jnp.zeros((), jnp.bool_),
        )

    @property
    def _plan_size(self) -> int:
        return self.layers_per_plan or self.num_layers

    def _score(self, state: BalancerState) -> jax.Array:
        loads_LE = self.estimator.estimate(state.loads)
        return self._score_of(state, loads_LE, state.tables.physical_to_logical_map)

    def _score_of(
        self, state: BalancerState, loads: jax.Array, placement: jax.Array
    ) -> jax.Array:
        return balancedness(loads, placement, self.num_devices, state.capacity)

    def _is_stranded(self, state: BalancerState) -> jax.Array:
        """[layers] bool, whether experts stand on a device that is to be left."""
        expert_LDI = state.tables.physical_to_logical_map.reshape(
            self.num_layers, self.num_devices, -1
        )
        is_left_1D1 = (state.capacity <= 0)[None, :, None]
        return ((expert_LDI >= 0) & is_left_1D1).any(axis=(1, 2))

    def _tables(self, placement: jax.Array) -> ExpertTables:
        return ExpertTables.from_placement(
            placement, self.num_experts, self.max_replicas
        )

    def _capacity(self, capacity: ArrayLike | None) -> jax.Array:
        return as_capacity(
            capacity, self.num_devices, self.num_slots, self.num_experts, False
        )


def _rows(state: BalancerState, layers_N: jax.Array) -> ExpertTables:
    """The tables of some layers."""
    return jax.tree.map(lambda leaf: leaf[layers_N], state.tables)


def _choose(is_new_N: jax.Array, new: ExpertTables, old: ExpertTables) -> ExpertTables:
    def choose(new_N: jax.Array, old_N: jax.Array) -> jax.Array:
        is_new = is_new_N.reshape(-1, *(1,) * (new_N.ndim - 1))
        return jnp.where(is_new, new_N, old_N)

    return jax.tree.map(choose, new, old)
