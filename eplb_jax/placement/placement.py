"""Where the replicas of the experts go.

`rebalance_experts` has upstream's signature (`deepseek-ai/EPLB@5791971 eplb.py`) and,
with upstream's policies, upstream's results, bit for bit. It is one jitted program: it
may be called on its own or inside another jitted function, under `vmap` too.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike

from eplb_jax.placement.checks import (
    as_capacity,
    check_choices,
    check_counts,
    check_sizes,
    is_traced,
)
from eplb_jax.placement.greedy import greedy_placement
from eplb_jax.placement.maps import replicas_by_expert
from eplb_jax.placement.scale import as_loads
from eplb_jax.placement.soft import soft_placement
from eplb_jax.placement.tables import ExpertTables

Policy = Literal["auto", "hierarchical", "global", "soft", "swaps"]
# num_replicas, num_groups, num_nodes, num_gpus.
_Sizes: TypeAlias = tuple[int, int, int, int]


def rebalance_experts(
    weight: ArrayLike,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    max_replicas: int | None = None,
    policy: Policy = "auto",
    device_capacity: ArrayLike | None = None,
    remote_price: float | jax.Array = 0.02,
    check_values: bool = False,
) -> ExpertTables:
    """Places `num_replicas` replicas of the experts on `num_gpus` GPUs.

    Policies:
      - `"hierarchical"`: upstream's. Groups are packed to nodes, and no expert leaves
        its node: the fewest bytes between nodes, the worst balance.
      - `"global"`: upstream's. Replicas are packed to GPUs, regardless of nodes.
      - `"auto"`: upstream's choice: hierarchical if the nodes divide the groups, else
        global.
      - `"soft"`: every expert keeps a replica on its home node; further replicas may
        go anywhere, at a price. Replicas are then swapped as long as that helps.
      - `"swaps"`: the same without homes: the best balance.

    The first three break ties as a stable descending sort and a search for the first
    minimum do, and add float32 loads in upstream's order, so that every machine gets
    the same maps. (Upstream leaves ties to an unstable sort.) The last two put no two
    replicas of an expert on one device if that can be avoided, spread loadless experts
    evenly, and take `device_capacity`.

    Args:
      weight: [layers, experts] loads, such as token counts.
      num_replicas: physical experts per layer; a multiple of `num_gpus`.
      num_groups: groups of experts, each a run of consecutive experts; divides the
        number of experts. `"global"` (also if `"auto"` chooses it) and `"swaps"` ignore
        it.
      num_nodes: nodes; GPUs are numbered node by node.
      num_gpus: GPUs; a multiple of `num_nodes`.
      max_replicas: width of the second map; None: always sufficient, num_replicas -
        experts + 1. That is mostly padding, and with many redundant experts most of
        the time goes into writing it. `"soft"` and `"swaps"` give no expert more
        replicas than that, if there are enough experts.
      policy: see above.
      device_capacity: [num_gpus] relative speeds; 0 for a dead device: nothing is
        placed there, and its physical experts are -1.
      remote_price: for `"soft"`, the log of the peak device load that serving all
        load away from home is worth: at 0.02, one percent of the load moves to
        another node if that lowers the peak by 0.02 percent or more.
      check_values: inside jit, check values with `jax.experimental.checkify`; the
        caller then has to be transformed with `checkify.checkify`.

    Returns:
      `ExpertTables`, a tuple of upstream's three maps.

    Raises:
      ValueError: for sizes that do not fit, and outside jit for values that are not
        loads, for a `max_replicas` that is too small, and for too few devices alive.

    Examples:
      Two layers of twelve experts on two nodes with four GPUs each, the example of
      upstream's README:

      >>> weight = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
      ...           [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
      >>> maps = rebalance_experts(weight, 16, 4, 2, 8)
      >>> for layer in maps.physical_to_logical_map.tolist():
      ...     print(layer)
      [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
      [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]
      >>> maps.expert_count[0].tolist()
      [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    """
    weight = as_loads(weight, check_values)
    sizes = (num_replicas, num_groups, num_nodes, num_gpus)
    policy, sizes = choose_policy(policy, device_capacity, weight.shape[1], sizes)
    sufficient = num_replicas - weight.shape[1] + 1
    width = _choose_width(max_replicas, sufficient)
    if policy in ("hierarchical", "global"):
        tables = _greedy(weight, *sizes, width)
    else:
        capacity = as_capacity(
            device_capacity, num_gpus, num_replicas, weight.shape[1], check_values
        )
        is_priced = policy == "soft" and num_nodes > 1
        price = jnp.asarray(remote_price, jnp.float32) if is_priced else None
        tables = _soft(weight, capacity, price, *sizes, width)
    if width < sufficient:
        _check_width(tables, check_values)
    return tables


def choose_policy(
    policy: Policy,
    device_capacity: ArrayLike | None,
    num_experts: int,
    sizes: _Sizes,
) -> tuple[Policy, _Sizes]:
    """Resolves `"auto"`; returns the policy and the sizes that it places for.

    Raises:
      ValueError: the policy is unknown, or the sizes do not fit it or each other.
    """
    num_replicas, num_groups, num_nodes, num_gpus = sizes
    check_choices(policy=(policy, Policy))
    check_counts(num_groups=num_groups, num_nodes=num_nodes)
    is_nested = num_groups % num_nodes == 0
    if policy == "auto":
        policy = "hierarchical" if is_nested else "global"
    if policy in ("global", "swaps"):
        num_groups = 1
    check_sizes(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    if policy in ("hierarchical", "soft") and not is_nested:
        raise ValueError(
            f"{policy=} packs whole groups to nodes, so {num_nodes=} must divide "
            f"{num_groups=}; use policy='global' or 'swaps'."
        )
    if policy in ("hierarchical", "global") and device_capacity is not None:
        raise ValueError(
            f"{policy=} takes no device_capacity; use policy='soft' or 'swaps'."
        )
    if policy == "global":
        return policy, (num_replicas, 1, 1, num_gpus)
    return policy, (num_replicas, num_groups, num_nodes, num_gpus)


def _choose_width(max_replicas: int | None, sufficient: int) -> int:
    if max_replicas is None:
        return sufficient
    if max_replicas < 1:
        raise ValueError(
            f"{max_replicas=} must be at least 1; None is always sufficient."
        )
    return max_replicas


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _greedy(
    weight_LE: jax.Array,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
    width: int,
) -> ExpertTables:
    expert_LS, rank_LS, count_LE = greedy_placement(
        weight_LE, num_replicas, num_groups, num_nodes, num_devices
    )
    physical_S = jnp.arange(num_replicas, dtype=jnp.int32)
    physical_LS = jnp.broadcast_to(physical_S, expert_LS.shape)
    physical_LER = replicas_by_expert(
        expert_LS, rank_LS, physical_LS, weight_LE.shape[1], width
    )
    return ExpertTables(expert_LS, physical_LER, count_LE)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _soft(
    weight_LE: jax.Array,
    capacity_D: jax.Array,
    remote_price: jax.Array | None,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
    width: int,
) -> ExpertTables:
    expert_LS = soft_placement(
        weight_LE,
        num_replicas,
        num_groups,
        num_nodes,
        num_devices,
        capacity_D,
        remote_price,
        width,
    )
    return ExpertTables.from_placement(expert_LS, weight_LE.shape[1], width)


def _check_width(tables: ExpertTables, check_values: bool) -> None:
    max_replicas, count_LE = tables.max_replicas, tables.expert_count
    if not is_traced(count_LE):
        most = int(np.asarray(count_LE).max())
        if most > max_replicas:
            raise ValueError(
                f"{max_replicas=} is too small: an expert has {most} replicas; use "
                f"max_replicas={most} or more, or None."
            )
    elif check_values:
        checkify.check(
            count_LE.max() <= max_replicas,
            f"{max_replicas=} is too small for the result; use more, or None.",
        )
