"""Collectives over a mesh axis, or over groups of its devices.

With groups, one mesh axis serves the exchange between all devices as well as the two
hops of a route by node.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Groups:
    """A mesh axis divided into groups of one size; collectives stay inside a group.

    Attributes:
      axis_name: the mesh axis.
      members: the devices of each group, in the group's order.
    """

    axis_name: str
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def nodes(cls, axis_name: str, num_devices: int, num_nodes: int) -> Groups:
        """Returns one group per node; a node's devices are consecutive.

        Examples:
          >>> Groups.nodes("ep", 4, 2).members
          ((0, 1), (2, 3))
        """
        devices = np.arange(num_devices).reshape(num_nodes, -1)
        return cls(axis_name, tuple(map(tuple, devices.tolist())))

    @classmethod
    def across_nodes(cls, axis_name: str, num_devices: int, num_nodes: int) -> Groups:
        """Returns one group per position in a node: its devices in all nodes.

        Examples:
          >>> Groups.across_nodes("ep", 4, 2).members
          ((0, 2), (1, 3))
        """
        devices = np.arange(num_devices).reshape(num_nodes, -1).T
        return cls(axis_name, tuple(map(tuple, devices.tolist())))

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """[devices] int32, the position of each device in its group."""
        members = np.array(self.members)
        positions = np.empty(members.size, np.int32)
        positions[members] = np.arange(members.shape[1], dtype=np.int32)[None]
        return positions


# A mesh axis, or groups of its devices.
Axis: TypeAlias = "str | Groups"


def axis_index(axis: Axis) -> jax.Array:
    """Returns this device's position on the axis, or in its group; [] int32."""
    if isinstance(axis, str):
        return lax.axis_index(axis)
    return jnp.asarray(axis.positions)[lax.axis_index(axis.axis_name)]


def all_gather(x: jax.Array, axis: Axis) -> jax.Array:
    """Gathers `x` from all devices of the axis or group: [devices, ...]."""
    name, groups = _split(axis)
    return lax.all_gather(x, name, axis_index_groups=groups)


def psum(x: jax.Array, axis: Axis) -> jax.Array:
    """Sums `x` over the devices of the axis or group."""
    name, groups = _split(axis)
    return lax.psum(x, name, axis_index_groups=groups)


def ragged_all_to_all(*args: jax.Array, axis: Axis) -> jax.Array:
    """Calls `lax.ragged_all_to_all` on the axis or group."""
    name, groups = _split(axis)
    return lax.ragged_all_to_all(*args, axis_name=name, axis_index_groups=groups)


def _split(axis: Axis) -> tuple[str, list[list[int]] | None]:
    if isinstance(axis, str):
        return axis, None
    return axis.axis_name, [list(group) for group in axis.members]
