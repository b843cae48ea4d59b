"""Replays recorded windows: what each balancing strategy would have gained.

A plan is always older than the load that it meets. So every strategy here plans on
window i and is scored on window i + 1, and the replicas that devices had to fetch are
counted.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from eplb_jax.files import Recording
from eplb_jax.placement import (
    Policy,
    balancedness,
    count_moves,
    rebalance_experts,
    refine_placement,
)


class Outcome(NamedTuple):
    """The outcome of one strategy; a step goes from window i to window i + 1.

    Attributes:
      balancedness: [steps], mean over layers with load in window i + 1.
      worst: [steps], the least balanced of these layers.
      moved: [steps], fraction of the physical experts that devices had to fetch before
        the step; before the first plan, experts are in order.
    """

    balancedness: np.ndarray
    worst: np.ndarray
    moved: np.ndarray


def in_order(num_layers: int, num_experts: int, num_replicas: int) -> np.ndarray:
    """Returns the placement without a plan: physical expert s is expert s mod experts.

    Args:
      num_layers: layers.
      num_experts: logical experts.
      num_replicas: physical experts per layer.

    Returns:
      [layers, num_replicas] int32.

    Examples:
      >>> in_order(1, 3, 4).tolist()
      [[0, 1, 2, 0]]
    """
    expert_S = np.arange(num_replicas, dtype=np.int32) % num_experts
    return np.tile(expert_S, (num_layers, 1))


def with_load(recording: Recording) -> Recording:
    """Leaves out the windows without any load, as `replay` does.

    Args:
      recording: from `read_loads`.

    Returns:
      A `Recording`.

    Examples:
      >>> with_load(Recording(("idle", "busy"), np.array([[[0, 0]], [[1, 2]]]))).names
      ('busy',)
    """
    has_load_W = _has_load(recording.counts).any(axis=1)
    busy = np.flatnonzero(has_load_W)
    return Recording(tuple(recording.names[i] for i in busy), recording.counts[busy])


def _has_load(counts_WLE: np.ndarray) -> np.ndarray:
    """Tells which layers have load in each window: [windows, layers]."""
    return np.asarray((counts_WLE > 0).any(axis=2))


def replay(
    counts: np.ndarray,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
    *,
    policy: Policy = "swaps",
    max_moves: int | None = None,
) -> dict[str, Outcome]:
    """Runs four strategies over recorded windows.

    Strategies:
      - `"never"`: experts in order, no plan at all.
      - `"once"`: a plan by `policy` on the first window, kept.
      - `"upstream"`: a fresh plan by upstream's policy on every window.
      - `"refine"`: the plan of `"once"`, then `refine_placement` on every window.

    Windows without any load are left out: there is nothing to plan for, and no balance
    to score.

    Args:
      counts: [windows, layers, experts] loads; at least two windows with load.
      num_replicas: physical experts per layer.
      num_groups: groups of experts.
      num_nodes: nodes.
      num_devices: devices.
      policy: for the first plan of `"once"` and `"refine"`.
      max_moves: for `"refine"`, physical experts moved per layer and window, at most;
        None: a sixth.

    Returns:
      An `Outcome` for each strategy.

    Raises:
      ValueError: for fewer than two windows with load, and as for `rebalance_experts`.

    Examples:
      >>> counts = np.array([[[8, 1, 1, 2]], [[1, 8, 1, 2]], [[1, 8, 1, 2]]])
      >>> outcomes = replay(counts, 6, 1, 1, 2, policy="auto")
      >>> {name: outcome.moved.tolist() for name, outcome in outcomes.items()}
      {'never': [0.0, 0.0], 'once': [...], 'upstream': [...], 'refine': [...]}
    """
    _check_counts(counts)
    has_load_WL = _has_load(counts)
    is_busy_W = has_load_WL.any(axis=1)
    if max_moves is None:
        max_moves = num_replicas // 6
    is_busy_L = has_load_WL.any(axis=0)
    windows = counts[is_busy_W][:, is_busy_L]
    has_load_WL = has_load_WL[is_busy_W][:, is_busy_L]
    sizes = (num_replicas, num_groups, num_nodes, num_devices)
    start = in_order(windows.shape[1], windows.shape[2], num_replicas)

    def plan(weight: np.ndarray, policy: Policy) -> Any:
        return rebalance_experts(weight, *sizes, policy=policy).physical_to_logical_map

    def refine(weight: np.ndarray, old: Any) -> Any:
        return refine_placement(weight, old, num_devices, max_moves=max_moves)[0]

    first = plan(windows[0], policy)
    strategies = {
        "never": lambda i, old: old,
        "once": lambda i, old: first,
        "upstream": lambda i, old: plan(windows[i], "auto"),
        "refine": lambda i, old: first if i == 0 else refine(windows[i], old),
    }
    outcomes = {}
    for name, next_placement in strategies.items():
        steps, placement = [], start
        for i in range(len(windows) - 1):
            old, placement = placement, next_placement(i, placement)
            score_L = np.asarray(balancedness(windows[i + 1], placement, num_devices))
            score_L = score_L[has_load_WL[i + 1]]
            moves_L = np.asarray(count_moves(old, placement, num_devices))
            steps.append((score_L.mean(), score_L.min(), moves_L.mean() / num_replicas))
        outcomes[name] = Outcome(
            *(np.array(column) for column in zip(*steps, strict=True))
        )
    return outcomes


def _check_counts(counts: np.ndarray) -> None:
    if counts.ndim != 3 or len(counts) < 2:
        raise ValueError(
            f"counts has shape {counts.shape}, but replay needs at least two windows, "
            "[windows, layers, experts]: it plans on one and scores on the next."
        )
    if counts.dtype.kind not in "biuf":
        raise ValueError(f"counts is {counts.dtype}, but loads are real numbers.")
    num_busy = _has_load(counts).any(axis=1).sum()
    if num_busy < 2:
        raise ValueError(
            f"counts has load in {num_busy} of {len(counts)} windows, but "
            "replay needs at least two windows with load: it plans on one and scores "
            "on the next."
        )
