"""The arrays of sglang-jax's `ExpertLocationMetadata`, from `ExpertTables`.

All functions work inside jit. Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from eplb_jax.placement import ExpertTables

Metadata = TypeVar("Metadata")


class ExpertLocationArrays(NamedTuple):
    """The arrays by which sglang-jax finds an expert, under its names.

    Attributes:
      logical_to_rank_dispatch_physical_map: [layers, experts] int32, the physical
        expert that all tokens of an expert go to by the static choice.
      logical_to_all_physical_map: [layers, experts, max_replicas] int32, padded with
        -1.
      logical_to_all_physical_map_num_valid: [layers, experts] int32, replicas.
      physical_to_logical_map: [layers, physical experts] int32.
    """

    logical_to_rank_dispatch_physical_map: jax.Array
    logical_to_all_physical_map: jax.Array
    logical_to_all_physical_map_num_valid: jax.Array
    physical_to_logical_map: jax.Array


def expert_location_arrays(tables: ExpertTables) -> ExpertLocationArrays:
    """Returns the engine's arrays for a placement.

    Args:
      tables: of all layers; their `max_replicas` is the arrays' width.

    Returns:
      `ExpertLocationArrays`.

    Examples:
      >>> tables = ExpertTables.from_placement(jnp.array([[1, 0, 1]]), 2)
      >>> arrays = expert_location_arrays(tables)
      >>> arrays.logical_to_rank_dispatch_physical_map.tolist()
      [[1, 0]]
      >>> arrays.logical_to_all_physical_map_num_valid.tolist()
      [[1, 2]]
    """
    return ExpertLocationArrays(
        tables.logical_to_physical_map[..., 0],
        tables.logical_to_physical_map,
        tables.expert_count,
        tables.physical_to_logical_map,
    )


def update_metadata(
    metadata: Metadata, tables: ExpertTables, layers: Sequence[int] | None = None
) -> Metadata:
    """Returns the engine's metadata with the arrays of a new placement.

    The engine's jitted step takes the metadata as an argument: with arrays of the same
    shapes it is not compiled again.

    Args:
      metadata: an `ExpertLocationMetadata`, which stays as it is.
      tables: of the layers that have experts.
      layers: index in the model of each of these layers, if the model has others; those
        keep their rows.

    Returns:
      The same kind of object.

    Raises:
      ValueError: the tables have other shapes than the metadata's arrays.

    Examples:
      >>> from types import SimpleNamespace
      >>> old = ExpertTables.from_placement(jnp.array([[0, 1, 0], [0, 1, 0]]), 2)
      >>> metadata = SimpleNamespace(**expert_location_arrays(old)._asdict())
      >>> new = ExpertTables.from_placement(jnp.array([[1, 0, 1]]), 2)
      >>> metadata = update_metadata(metadata, new, layers=[1])
      >>> metadata.physical_to_logical_map.tolist()
      [[0, 1, 0], [1, 0, 1]]
    """
    updated = copy.copy(metadata)
    for name, new in expert_location_arrays(tables)._asdict().items():
        old = jnp.asarray(getattr(metadata, name))
        num_rows = len(old) if layers is None else len(layers)
        if new.shape != (num_rows, *old.shape[1:]):
            raise ValueError(
                f"{name} is {list(new.shape)} for these tables, but "
                f"{list(old.shape)} in the metadata, {num_rows} layers of it to be "
                "changed; make tables of the metadata's max_replicas, and name the "
                "layers that have experts."
            )
        new = new.astype(old.dtype)
        if layers is not None:
            new = old.at[jnp.asarray(layers, jnp.int32)].set(new)
        setattr(updated, name, new)
    return updated
