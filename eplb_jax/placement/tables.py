"""A placement as one pytree: which physical expert is which, in both directions.

All shapes are static: they depend on the numbers of layers, experts and physical
experts and on `max_replicas`, not on where the replicas are. A new placement is new
values for the same program.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from eplb_jax.placement.checks import as_placement, is_traced
from eplb_jax.placement.hashing import mix_bits
from eplb_jax.placement.maps import maps_of_placement


class ExpertTables(NamedTuple):
    """The three maps of a placement, under upstream's names.

    The leading axis of layers may be missing: `tables.layer(i)`, and what `lax.scan`
    and `jax.vmap` pass to their body, are the tables of one layer.

    Attributes:
      physical_to_logical_map: [layers, physical experts] int32, the expert that each
        is a replica of; -1 if empty.
      logical_to_physical_map: [layers, experts, max_replicas] int32, the physical
        experts of each expert; -1 where it has no more.
      expert_count: [layers, experts] int32, replicas of each expert.
    """

    physical_to_logical_map: jax.Array
    logical_to_physical_map: jax.Array
    expert_count: jax.Array

    @classmethod
    def from_placement(
        cls,
        physical_to_logical_map: ArrayLike,
        num_logical_experts: int,
        max_replicas: int | None = None,
    ) -> ExpertTables:
        """Makes the other two maps, with the replicas of an expert in order.

        Args:
          physical_to_logical_map: [layers, physical experts] or [physical experts]
            int32, -1 if empty.
          num_logical_experts: logical experts.
          max_replicas: width of the second map; None: always sufficient, physical
            experts - experts + 1. Placements that replace each other in one program
            need the same width.

        Returns:
          `ExpertTables`. Outside jit they are validated.

        Raises:
          ValueError: for a wrong rank, dtype or width, and outside jit for numbers of
            no expert, and if an expert has no replica, or more than `max_replicas`.

        Examples:
          >>> tables = ExpertTables.from_placement(jnp.array([1, 0, 1, 2]), 3)
          >>> tables.logical_to_physical_map.tolist()
          [[1, -1], [0, 2], [3, -1]]
        """
        placement = as_placement(
            physical_to_logical_map, num_logical_experts, of="there are"
        )
        if placement.ndim not in (1, 2):
            raise ValueError(
                f"physical_to_logical_map has shape {placement.shape}; it must be "
                "[layers, physical experts] or [physical experts]."
            )
        num_physical_experts = placement.shape[-1]
        if max_replicas is None:
            max_replicas = num_physical_experts - num_logical_experts + 1
        if max_replicas < 1:
            raise ValueError(
                f"{max_replicas=} must be at least 1, and {num_physical_experts=} at "
                f"least {num_logical_experts=}; every expert needs a replica."
            )
        layered = placement.reshape(-1, num_physical_experts)
        tables = cls(*maps_of_placement(layered, num_logical_experts, max_replicas))
        if placement.ndim == 1:
            tables = jax.tree.map(lambda leaf: leaf[0], tables)
        if not is_traced(placement):
            tables.validate()
        return tables

    @classmethod
    def in_order(cls, num_experts: int) -> ExpertTables:
        """Returns the tables of one layer in which physical expert i is expert i.

        Examples:
          >>> ExpertTables.in_order(3).physical_to_logical_map.tolist()
          [0, 1, 2]
        """
        expert_E = jnp.arange(num_experts, dtype=jnp.int32)
        return cls(expert_E, expert_E[:, None], jnp.ones_like(expert_E))

    @property
    def num_physical_experts(self) -> int:
        """Physical experts per layer."""
        return self.physical_to_logical_map.shape[-1]

    @property
    def num_experts(self) -> int:
        """Logical experts per layer."""
        return self.expert_count.shape[-1]

    @property
    def max_replicas(self) -> int:
        """Width of `logical_to_physical_map`."""
        return self.logical_to_physical_map.shape[-1]

    def layer(self, index: int | jax.Array) -> ExpertTables:
        """Returns the tables of one layer.

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
        """Adds up the counts of each expert's replicas; for the tables of one layer.

        Args:
          tokens_per_physical_expert: [physical experts].

        Returns:
          [experts], of the same dtype.

        Examples:
          >>> tables = ExpertTables.from_placement(jnp.array([1, 0, 1, -1]), 2)
          >>> tables.add_replicas(jnp.array([10, 20, 30, 0])).tolist()
          [20, 40]
        """
        expert_S = self.physical_to_logical_map
        # One past the end if empty: -1 would be the last expert.
        expert_S = jnp.where(expert_S >= 0, expert_S, self.num_experts)
        total_E = jnp.zeros(self.num_experts, tokens_per_physical_expert.dtype)
        return total_E.at[expert_S].add(tokens_per_physical_expert, mode="drop")

    def is_valid(self) -> jax.Array:
        """Tells whether the maps agree and every expert has a replica; works in jit.

        Returns:
          [layers] bool, or [] for the tables of one layer.

        Examples:
          >>> tables = ExpertTables.from_placement(jnp.array([[0, 1], [1, 0]]), 2)
          >>> wrong = tables.physical_to_logical_map.at[1].set(jnp.array([1, 1]))
          >>> tables._replace(physical_to_logical_map=wrong).is_valid().tolist()
          [True, False]
        """
        return _is_valid(*self)

    def validate(self) -> None:
        """Raises unless the maps agree and every expert has a replica; not for jit.

        Raises:
          ValueError: naming the first layer and expert for which that is not so.

        Examples:
          >>> ExpertTables.from_placement(jnp.array([0, 0, 1]), 3)
          Traceback (most recent call last):
            ...
          ValueError: Expert 2 of layer 0 has no replica; ...
        """
        maps = tuple(np.asarray(leaf) for leaf in self)
        if maps[0].ndim == 1:
            maps = tuple(leaf[None] for leaf in maps)
        physical, count = maps[1], maps[2]
        if physical.shape[:-1] != count.shape or maps[0].shape[:-1] != count.shape[:-1]:
            shapes = ", ".join(str(leaf.shape) for leaf in maps)
            raise ValueError(
                f"The shapes of the three maps do not agree: {shapes}; make them from "
                "one placement with ExpertTables.from_placement."
            )
        for what, where, remedy in (
            ("has no replica", count < 1, "every expert needs one: plan again"),
            (
                f"has more than max_replicas={self.max_replicas} replicas",
                count > self.max_replicas,
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
        """Hashes the tables, so that ranks can compare theirs.

        Ranks that plan independently and disagree compute wrong outputs without any
        error. They agree if `lax.pmin` and `lax.pmax` of this over the mesh are equal.

        Returns:
          [layers] uint32, or [] for the tables of one layer.

        Examples:
          >>> one = ExpertTables.from_placement(jnp.array([[0, 1, 1]]), 2)
          >>> two = ExpertTables.from_placement(jnp.array([[1, 0, 1]]), 2)
          >>> bool((one.checksum() == two.checksum()).any())
          False
        """
        return _checksum(self.physical_to_logical_map, self.logical_to_physical_map)


@jax.jit
def _is_valid(
    expert_S: jax.Array, physical_ER: jax.Array, count_E: jax.Array
) -> jax.Array:
    if expert_S.ndim == 2:
        return jax.vmap(_is_valid)(expert_S, physical_ER, count_E)
    num_physical_experts = expert_S.shape[0]
    num_experts, max_replicas = physical_ER.shape
    rank_1R = jnp.arange(max_replicas, dtype=jnp.int32)[None]
    is_used_ER = rank_1R < count_E[:, None]
    expert_E1 = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    is_inside_ER = (physical_ER >= 0) & (physical_ER < num_physical_experts)
    physical_ER = jnp.where(is_inside_ER, physical_ER, -1)
    is_right_ER = is_inside_ER & (expert_S[physical_ER] == expert_E1)
    named_S = jnp.zeros(num_physical_experts, jnp.int32)
    named_S = named_S.at[physical_ER].add(is_inside_ER.astype(jnp.int32))
    return (
        (is_used_ER == (physical_ER >= 0)).all()
        & (is_right_ER == is_used_ER).all()
        & (named_S == (expert_S >= 0).astype(jnp.int32)).all()
        & (count_E >= 1).all()
        & (count_E <= max_replicas).all()
    )


@jax.jit
def _checksum(expert: jax.Array, physical: jax.Array) -> jax.Array:
    flat_physical = physical.reshape(*physical.shape[:-2], -1)
    flat = jnp.concatenate([expert, flat_physical], axis=-1)
    position = jnp.arange(flat.shape[-1], dtype=jnp.uint32)
    position = position.reshape((1,) * (flat.ndim - 1) + (-1,))
    mixed = mix_bits(mix_bits(position) ^ lax.bitcast_convert_type(flat, jnp.uint32))
    return mixed.sum(axis=-1, dtype=jnp.uint32)
