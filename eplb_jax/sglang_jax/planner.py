"""Plans for sglang-jax, by the signature of its own planner.

That is `rebalance_experts` of `sgl_jax/srt/eplb/eplb_algorithms`
(sgl-project/sglang-jax@cddbf6f1).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from eplb_jax import placement
from eplb_jax.placement import ExpertTables, Policy, as_loads

# The engine's names of its algorithms; other policies go by our names.
_POLICIES: dict[str, Policy] = {
    "deepseek": "global",
    "deepseek_hierarchical": "hierarchical",
    "global": "global",
    "hierarchical": "hierarchical",
    "soft": "soft",
    "swaps": "swaps",
}
# Replicas that the first attempt has room for: writing a wider map takes longer than
# the plan, and real loads need fewer.
_USUAL_WIDTH = 48


def rebalance_experts(
    tokens_per_expert: Any,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Plans where experts go, as sglang-jax's function of this name does.

    The maps are its own, with ties broken as `eplb_jax.rebalance_experts` says.

    Args:
      tokens_per_expert: [layers, experts] or [experts] loads.
      num_physical_experts: physical experts of a layer.
      num_local_physical_experts: physical experts of a device.
      num_groups: groups of experts; None: one.
      num_nodes: nodes.
      algorithm: the engine's `EplbAlgorithm`, or its name; `"swaps"` and `"soft"` are
        our policies, which balance better.

    Returns:
      physical_to_logical_map: [layers, num_physical_experts] int64.
      logical_to_all_physical_map: [layers, experts, most replicas] int64, padded with
        -1.
      expert_count: [layers, experts] int64, replicas of each expert.

    Raises:
      ValueError: for an unknown algorithm, for sizes that do not fit, and for values
        that are no loads.

    Examples:
      >>> maps = rebalance_experts([[90, 5, 3, 2]], 6, 3, None, 1, "deepseek")
      >>> maps[0].tolist(), maps[2].tolist()
      ([[0, 0, 3, 0, 1, 2]], [[3, 1, 1, 1]])
      >>> maps[1].tolist()
      [[[0, 3, 1], [4, -1, -1], [5, -1, -1], [2, -1, -1]]]
    """
    name = getattr(algorithm, "name", algorithm)
    if name not in _POLICIES:
        raise ValueError(f"{algorithm=} must be one of {', '.join(_POLICIES)}.")
    if num_local_physical_experts < 1 or (
        num_physical_experts % num_local_physical_experts
    ):
        raise ValueError(
            f"{num_local_physical_experts=} must divide {num_physical_experts=}."
        )
    weight = as_loads(np.atleast_2d(np.asarray(tokens_per_expert)), False)
    sufficient = num_physical_experts - weight.shape[1] + 1
    plan = functools.partial(
        _plan,
        weight,
        num_physical_experts,
        1 if num_groups is None else num_groups,
        num_nodes,
        num_physical_experts // num_local_physical_experts,
        _POLICIES[name],
    )
    tables = plan(max(1, min(_USUAL_WIDTH, sufficient)))
    if (most := np.asarray(tables.expert_count).max()) > tables.max_replicas:
        tables = plan(sufficient)
    expert, physical, count = (np.asarray(each) for each in tables)
    # Cut before it is copied, outside jax: a width of its own would compile.
    physical = physical[..., :most]
    return expert.astype(np.int64), physical.astype(np.int64), count.astype(np.int64)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _plan(
    weight: jax.Array,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
    policy: Policy,
    max_replicas: int,
) -> ExpertTables:
    return placement.rebalance_experts(
        weight,
        num_replicas,
        num_groups,
        num_nodes,
        num_devices,
        policy=policy,
        max_replicas=max_replicas,
    )
