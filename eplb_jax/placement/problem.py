"""What a search is given, and what it carries from step to step.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class Rules:
    """Static settings of a search.

    Attributes:
      num_nodes: nodes that the devices are divided into, in order.
      has_homes: whether experts have a home node.
      has_budget: whether `PlacementProblem.max_moves` applies.
      looks_ahead: whether to search on after the budget, to know where that leads.
      separate: whether to separate replicas of one expert on one device first.
    """

    num_nodes: int = 1
    has_homes: bool = False
    has_budget: bool = False
    looks_ahead: bool = False
    separate: bool = True


class Limits(NamedTuple):
    """Settings of a search that may change without compiling again.

    Attributes:
      max_steps: [] int32, maximum number of steps.
      max_replicas: [] int32, of an expert; one that has as many gets no further one.
      remote_price: [] float32, of load served away from home.
    """

    max_steps: jax.Array
    max_replicas: jax.Array
    remote_price: jax.Array


class PlacementProblem(NamedTuple):
    """A layer's placement problem; `search` takes one with a leading axis of layers.

    Attributes:
      weight: [experts] float32 loads, of sum 1.
      per_share: [devices] float32, 1 / the device's share of the capacity; 0 if dead.
      home: [experts] int32, home node of each expert, or -1.
      original: [physical experts] int32, the placement that `max_moves` counts from.
      max_moves: [] int32, physical experts that may differ from the original.
      min_gain: [] float32, how much each physical expert that a move changes must lower
        the objective at least.
    """

    weight: jax.Array
    per_share: jax.Array
    home: jax.Array
    original: jax.Array
    max_moves: jax.Array
    min_gain: jax.Array


class SearchState(NamedTuple):
    """What a search carries from step to step, for one layer.

    Attributes:
      expert_S: int32, the placement, -1 if empty.
      count_E: int32, replicas of each expert.
      is_separated: [] bool, whether no more replicas are to be separated.
      is_filled: [] bool, whether no more empty physical experts are to be filled.
      is_within: [] bool, whether all moves so far are within the budget.
      is_done: [] bool, whether no move is worth it any more.
      best_S: int32, the best placement so far.
      best_cost: [] float32, its objective.
      best_defects: [] int32, its experts without a replica, and duplicates.
      kept_S: int32, the best placement within the budget.
    """

    expert_S: jax.Array
    count_E: jax.Array
    is_separated: jax.Array
    is_filled: jax.Array
    is_within: jax.Array
    is_done: jax.Array
    best_S: jax.Array
    best_cost: jax.Array
    best_defects: jax.Array
    kept_S: jax.Array
