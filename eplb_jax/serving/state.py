"""What a server keeps between steps for its balancer, and what one plan changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from eplb_jax.placement import ExpertTables


class BalancerState(NamedTuple):
    """What a server keeps between steps for `ExpertBalancer`; replicated arrays.

    Attributes:
      loads: state of the load estimator.
      tables: [layers, ...], by which the weights are placed.
      capacity: [devices] float32 relative speeds; 0 for a device to be vacated.
      is_due: [layers] bool, whether a device has got another speed, or has an empty
        physical expert, that the layer's placement does not make use of yet.
      step: [] int32, steps observed, less a multiple of `every` after 2^31.
      cursor: [] int32, the layer that the next plan considers first.
      num_moves: [] int32, physical experts that have got another expert so far. This
        and the next two stop at 2^31 - 1.
      num_refused: [] int32, plans that the devices did not agree on.
      num_rejected: [] int32, plans of a layer that would have gained too little.
    """

    loads: Any
    tables: ExpertTables
    capacity: jax.Array
    is_due: jax.Array
    step: jax.Array
    cursor: jax.Array
    num_moves: jax.Array
    num_refused: jax.Array
    num_rejected: jax.Array


class RebalancePlan(NamedTuple):
    """New tables for a few layers.

    Attributes:
      layers: [n] int32, distinct layers.
      tables: [n, ...], of these layers; the old ones where nothing changes.
      is_changed: [n] bool, whether the tables are new.
      num_moves: [n] int32, physical experts whose weights are migrated.
      is_due: [n] bool, see `BalancerState`.
      is_rejected: [n] bool, whether there are moves that would gain too little.
      cursor: [] int32, see `BalancerState`.
      is_refused: [] bool, whether the devices disagreed; then nothing changes.
    """

    layers: jax.Array
    tables: ExpertTables
    is_changed: jax.Array
    num_moves: jax.Array
    is_due: jax.Array
    is_rejected: jax.Array
    cursor: jax.Array
    is_refused: jax.Array


def tables_of(state: BalancerState, layers: jax.Array) -> ExpertTables:
    """Selects the tables of some layers.

    Args:
      state: of the server.
      layers: [n] int32.

    Returns:
      `ExpertTables` with the leading axis [n].
    """
    return jax.tree.map(lambda leaf: leaf[layers], state.tables)
