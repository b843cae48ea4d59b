"""The devices that exchange something: those of a mesh axis, or groups of them.

One mesh axis serves both for all devices and for the two hops of a way by node.
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
    """A mesh axis cut into groups of one size, each of which keeps to itself.

    Attributes:
      axis_name: the mesh axis.
      members: for each group the devices, in the order in which they count.
    """

    axis_name: str
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def nodes(cls, axis_name: str, num_devices: int, num_nodes: int) -> Groups:
        """The devices of each node, which lie side by side.

        Examples:
          >>> Groups.nodes("ep", 4, 2).members
          ((0, 1), (2, 3))
        """
        devices = np.arange(num_devices).reshape(num_nodes, -1)
        return cls(axis_name, tuple(map(tuple, devices.tolist())))

    @classmethod
    def across_nodes(cls, axis_name: str, num_devices: int, num_nodes: int) -> Groups:
        """The devices that have the same place in their nodes.

        Examples:
          >>> Groups.across_nodes("ep", 4, 2).members
          ((0, 2), (1, 3))
        """
        devices = np.arange(num_devices).reshape(num_nodes, -1).T
        return cls(axis_name, tuple(map(tuple, devices.tolist())))

    @functools.cached_property
    def places(self) -> np.ndarray:
        """[devices] int32, the place of each in its group."""
        members = np.array(self.members)
        places = np.empty(members.size, np.int32)
        places[members] = np.arange(members.shape[1], dtype=np.int32)[None]
        return places


# A mesh axis, or groups of its devices.
Axis: TypeAlias = "str | Groups"


def axis_index(axis: Axis) -> jax.Array:
    """[] int32, the place of this device among those that it exchanges with."""
    if isinstance(axis, str):
        return lax.axis_index(axis)
    return jnp.asarray(axis.places)[lax.axis_index(axis.axis_name)]


def all_gather(x: jax.Array, axis: Axis) -> jax.Array:
    """[devices, ...], everyone's `x`."""
    name, groups = _split(axis)
    return lax.all_gather(x, name, axis_index_groups=groups)


def psum(x: jax.Array, axis: Axis) -> jax.Array:
    """The sum of everyone's `x`."""
    name, groups = _split(axis)
    return lax.psum(x, name, axis_index_groups=groups)


def ragged_all_to_all(*args: jax.Array, axis: Axis) -> jax.Array:
    """`lax.ragged_all_to_all`."""
    name, groups = _split(axis)
    return lax.ragged_all_to_all(*args, axis_name=name, axis_index_groups=groups)


def _split(axis: Axis) -> tuple[str, list[list[int]] | None]:
    if isinstance(axis, str):
        return axis, None
    return axis.axis_name, [list(group) for group in axis.members]
