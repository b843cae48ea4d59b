"""The maps of a placement as one pytree, for routers inside jit.

All shapes are static: they depend on the numbers of layers, experts and slots and on
`max_replicas`, and not on where the replicas are. A new placement is new values for
the same program.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eplb_jax.placement.checks import is_traced
from eplb_jax.placement.hashing import mix_bits
from eplb_jax.placement.placement import placement_maps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertTables:
    """Which slot holds which expert, in both directions.

    The leading axis of layers may be missing: `tables.layer(i)`, or what `lax.scan`
    and `jax.vmap` hand to their body, is the tables of one layer.

    Attributes:
      physical_to_logical_map: [layers, slots] int32, the expert in each slot; -1 for
        an empty one.
      logical_to_physical_map: [layers, experts, max_replicas] int32, the slots of each
        expert; -1 where it has no more.
      expert_count: [layers, experts] int32, replicas of each expert.
    """

    physical_to_logical_map: jax.Array
    logical_to_physical_map: jax.Array
    expert_count: jax.Array

    @classmethod
    def from_placement(
        cls,
        physical_to_logical_map: jax.Array,
        num_logical_experts: int,
        max_replicas: int | None = None,
    ) -> ExpertTables:
        """The tables of a placement, replicas of an expert in slot order.

        Args:
          physical_to_logical_map: [layers, slots] or [slots] int32, -1 for an empty
            slot.
          num_logical_experts: logical experts.
          max_replicas: width of the second map; None: what always suffices,
            slots - experts + 1. Placements that replace each other in one program
            need the same width.

        Returns:
          `ExpertTables`. Outside jit they are validated.

        Raises:
          ValueError: for a wrong rank or width, and outside jit if an expert has no
            slot, or more than `max_replicas`.

        Examples:
          >>> tables = ExpertTables.from_placement(jnp.array([1, 0, 1, 2]), 3)
          >>> tables.logical_to_physical_map.tolist()
          [[1, -1], [0, 2], [3, -1]]
        """
        placement = jnp.asarray(physical_to_logical_map, jnp.int32)
        if placement.ndim not in (1, 2):
            raise ValueError(
                f"physical_to_logical_map has shape {placement.shape}; it must be "
                "[layers, slots] or [slots]."
            )
        num_slots = placement.shape[-1]
        if max_replicas is None:
            max_replicas = num_slots - num_logical_experts + 1
        if max_replicas < 1:
            raise ValueError(
                f"{max_replicas=} must be at least 1; {num_slots} slots hold "
                f"{num_logical_experts=} only if there are as many."
            )
        layered = placement.reshape(-1, num_slots)
        maps = placement_maps(layered, num_logical_experts, max_replicas)
        if placement.ndim == 1:
            maps = jax.tree.map(lambda leaf: leaf[0], maps)
        tables = cls(*maps)
        if not is_traced(placement):
            tables.validate()
        return tables

    @property
    def num_slots(self) -> int:
        """Slots of a layer."""
        return self.physical_to_logical_map.shape[-1]

    @property
    def num_experts(self) -> int:
        """Logical experts of a layer."""
        return self.expert_count.shape[-1]

    @property
    def max_replicas(self) -> int:
        """Width of `logical_to_physical_map`."""
        return self.logical_to_physical_map.shape[-1]

    def layer(self, index: int | jax.Array) -> ExpertTables:
        """The tables of one layer.

        Args:
          index: the layer; may be traced.

        Returns:
          `ExpertTables` without the leading axis.

        Examples:
          >>> tables = ExpertTables.from_placement(jnp.array([[0, 1], [1, 0]]), 2)
          >>> tables.layer(1).physical_to_logical_map.tolist()
          [1, 0]
        """
        return jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), self
        )

    def add_replicas(self, tokens_per_physical_expert: jax.Array) -> jax.Array:
        """Counts of experts from counts of their slots; for the tables of one layer.

        Args:
          tokens_per_physical_expert: [slots].

        Returns:
          [experts], of the same dtype.

        Examples:
          >>> tables = ExpertTables.from_placement(jnp.array([1, 0, 1, -1]), 2)
          >>> tables.add_replicas(jnp.array([10, 20, 30, 0])).tolist()
          [20, 40]
        """
        expert_S = self.physical_to_logical_map
        # One past the end for an empty slot: -1 would be the last expert.
        expert_S = jnp.where(expert_S >= 0, expert_S, self.num_experts)
        total_E = jnp.zeros(self.num_experts, tokens_per_physical_expert.dtype)
        return total_E.at[expert_S].add(tokens_per_physical_expert, mode="drop")

    def is_valid(self) -> jax.Array:
        """Whether the maps agree and every expert has a slot; may be called in jit.

        Returns:
          [layers] bool, or [] for the tables of one layer.

        Examples:
          >>> import dataclasses
          >>> tables = ExpertTables.from_placement(jnp.array([[0, 1], [1, 0]]), 2)
          >>> wrong = tables.physical_to_logical_map.at[1].set(jnp.array([1, 1]))
          >>> tables = dataclasses.replace(tables, physical_to_logical_map=wrong)
          >>> tables.is_valid().tolist()
          [True, False]
        """
        return _is_valid(*_leaves(self))

    def validate(self) -> None:
        """Raises unless every expert has a slot and the maps agree; not for jit.

        Raises:
          ValueError: naming the first layer and expert at which they do not.

        Examples:
          >>> ExpertTables.from_placement(jnp.array([0, 0, 1]), 3)
          Traceback (most recent call last):
            ...
          ValueError: Expert 2 of layer 0 has no slot; ...
        """
        maps = tuple(np.asarray(leaf) for leaf in _leaves(self))
        if maps[0].ndim == 1:
            maps = tuple(leaf[None] for leaf in maps)
        slots, count = maps[1], maps[2]
        if slots.shape[:-1] != count.shape or maps[0].shape[:-1] != count.shape[:-1]:
            shapes = ", ".join(str(leaf.shape) for leaf in maps)
            raise ValueError(f"The shapes of the three maps do not agree: {shapes}.")
        for what, where, remedy in (
            ("has no slot", count < 1, "every expert needs one: plan again"),
            (
                f"has more than max_replicas={slots.shape[-1]} replicas",
                count > slots.shape[-1],
                "make the tables wider",
            ),
        ):
            if where.any():
                layer, expert = np.argwhere(where)[0]
                raise ValueError(f"Expert {expert} of layer {layer} {what}; {remedy}.")
        is_valid = np.atleast_1d(np.asarray(self.is_valid()))
        if not is_valid.all():
            raise ValueError(
                f"The maps of layer {np.argmin(is_valid)} contradict each other; make "
                "them from one placement with ExpertTables.from_placement."
            )

    def checksum(self) -> jax.Array:
        """A number that differs if the tables do, so that ranks can compare.

        Ranks that plan for themselves and disagree compute wrong outputs without
        any error; comparing `lax.pmin` and `lax.pmax` of this over the mesh tells.

        Returns:
          [layers] uint32, or [] for the tables of one layer.

        Examples:
          >>> one = ExpertTables.from_placement(jnp.array([[0, 1, 1]]), 2)
          >>> two = ExpertTables.from_placement(jnp.array([[1, 0, 1]]), 2)
          >>> bool((one.checksum() == two.checksum()).any())
          False
        """
        return _checksum(self.physical_to_logical_map, self.logical_to_physical_map)


def _leaves(tables: ExpertTables) -> tuple[jax.Array, jax.Array, jax.Array]:
    return (
        tables.physical_to_logical_map,
        tables.logical_to_physical_map,
        tables.expert_count,
    )


@jax.jit
def _is_valid(
    expert_S: jax.Array, slots_EC: jax.Array, count_E: jax.Array
) -> jax.Array:
    if expert_S.ndim == 2:
        return jax.vmap(_is_valid)(expert_S, slots_EC, count_E)
    num_slots, (num_experts, max_replicas) = expert_S.shape[0], slots_EC.shape
    rank_1C = jnp.arange(max_replicas, dtype=jnp.int32)[None]
    is_used_EC = rank_1C < count_E[:, None]
    expert_E1 = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    is_inside_EC = (slots_EC >= 0) & (slots_EC < num_slots)
    slots_EC = jnp.where(is_inside_EC, slots_EC, -1)
    is_right_EC = is_inside_EC & (expert_S[slots_EC] == expert_E1)
    named_S = jnp.zeros(num_slots, jnp.int32)
    named_S = named_S.at[slots_EC].add(is_inside_EC.astype(jnp.int32))
    return (
        (is_used_EC == (slots_EC >= 0)).all()
        & (is_right_EC == is_used_EC).all()
        & (named_S == (expert_S >= 0).astype(jnp.int32)).all()
        & (count_E >= 1).all()
        & (count_E <= max_replicas).all()
    )


@jax.jit
def _checksum(expert: jax.Array, slots: jax.Array) -> jax.Array:
    flat_slots = slots.reshape(*slots.shape[:-2], -1)
    flat = jnp.concatenate([expert, flat_slots], axis=-1)
    place = jnp.arange(flat.shape[-1], dtype=jnp.uint32)
    place = place.reshape((1,) * (flat.ndim - 1) + (-1,))
    mixed = mix_bits(mix_bits(place) ^ lax.bitcast_convert_type(flat, jnp.uint32))
    return mixed.sum(axis=-1, dtype=jnp.uint32)
