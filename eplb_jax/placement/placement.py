"""Where the replicas of the experts go.

`rebalance_experts` has upstream's signature (`deepseek-ai/EPLB@5791971 eplb.py`) and,
with upstream's policies, upstream's results, bit for bit. It is one jitted program: it
may be called on its own or inside another jitted function, under `vmap` too.

Shape suffixes: L layers, E experts, S slots of a layer.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike

from eplb_jax.placement.checks import as_capacity, as_loads, check_sizes, is_traced
from eplb_jax.placement.greedy import greedy_placement
from eplb_jax.placement.search import count_replicas
from eplb_jax.placement.soft import soft_placement

Policy = Literal["auto", "hierarchical", "global", "soft", "swaps"]


class Placement(NamedTuple):
    """The three maps of a placement, under upstream's names.

    Attributes:
      physical_to_logical_map: [layers, num_replicas] int32, the expert in each slot;
        -1 for an empty one.
      logical_to_physical_map: [layers, experts, max_replicas] int32, the slots of each
        expert; -1 where it has no more.
      expert_count: [layers, experts] int32, replicas of each expert.
    """

    physical_to_logical_map: jax.Array
    logical_to_physical_map: jax.Array
    expert_count: jax.Array


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
) -> Placement:
    """Places `num_replicas` replicas of the experts on `num_gpus` GPUs.

    Policies:
      - `"hierarchical"`: upstream's: groups are packed to nodes, and no expert leaves
        its node. Fewest bytes between nodes, worst balance.
      - `"global"`: upstream's: replicas are packed to GPUs, nodes or not.
      - `"auto"`: upstream's choice: hierarchical where the nodes divide the groups.
      - `"soft"`: every expert keeps a replica on its home node, further ones may go
        anywhere, at a price; then replicas are swapped until that helps no more.
      - `"swaps"`: the same without homes: the best balance.

    The first three resolve ties as a stable descending sort and a search for the
    first minimum do, and add float32 loads in upstream's order, so that every machine
    gets the same maps. (Upstream leaves ties to an unstable sort.) The last two put no
    two replicas of an expert on one device where that can be avoided, spread loadless
    experts evenly, and take `device_capacity`.

    Args:
      weight: [layers, experts] loads, such as counts of tokens.
      num_replicas: slots of all GPUs; a multiple of `num_gpus`.
      num_groups: groups of experts, each a run of consecutive experts; divides the
        number of experts. `"global"` and `"swaps"` know no groups and ignore it.
      num_nodes: nodes; GPUs are numbered node by node.
      num_gpus: GPUs; a multiple of `num_nodes`.
      max_replicas: width of the second map; None: what always suffices,
        num_replicas - experts + 1. That is mostly padding, and for many redundant
        slots most of the time goes into writing it.
      policy: see above.
      device_capacity: [num_gpus] relative speeds, 0 for a dead device: nothing is
        placed there, and its slots are -1.
      remote_price: with `"soft"`, the log of the peak device load that serving all
        load away from home is worth: at 0.02, one percent of the load goes to
        another node if that lowers the peak by 0.0002 or more of itself.
      check_values: inside jit, check values with `jax.experimental.checkify`; the
        caller then has to be transformed with `checkify.checkify`.

    Returns:
      A `Placement`, which is a tuple of the three maps.

    Raises:
      ValueError: for sizes that do not fit, and outside jit for values that are not
        loads, for too small a `max_replicas`, and for too few devices alive.

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
    num_experts = weight.shape[1]
    if policy not in get_args(Policy):
        raise ValueError(f"{policy=} must be one of {', '.join(get_args(Policy))}.")
    if policy in ("global", "swaps"):
        num_groups = 1
    check_sizes(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    policy = _choose(policy, num_groups, num_nodes)
    width = num_replicas - num_experts + 1
    if max_replicas is not None and max_replicas < 1:
        raise ValueError(f"{max_replicas=} must be at least 1; None always suffices.")
    sizes = (num_replicas, num_groups, num_nodes, num_gpus)
    if policy in ("hierarchical", "global"):
        if device_capacity is not None:
            raise ValueError(
                f"{policy=} knows no device_capacity; use policy='soft' or 'swaps'."
            )
        if policy == "global":
            sizes = (num_replicas, 1, 1, num_gpus)
        maps = _greedy(weight, *sizes, max_replicas or width)
    else:
        capacity = as_capacity(
            device_capacity, num_gpus, num_replicas, num_experts, check_values
        )
        price = None
        if policy == "soft" and num_nodes > 1:
            price = jnp.asarray(remote_price, jnp.float32)
        maps = _soft(weight, capacity, price, *sizes, max_replicas or width)
    if max_replicas is not None and max_replicas < width:
        _check_width(maps.expert_count, max_replicas, check_values)
    return maps


def placement_maps(
    physical_to_logical_map: ArrayLike, num_logical_experts: int, max_replicas: int
) -> Placement:
    """The other two maps of a placement, replicas of an expert in slot order.

    Args:
      physical_to_logical_map: [layers, slots] int32, -1 for an empty slot.
      num_logical_experts: logical experts.
      max_replicas: width of the second map; replicas beyond it are left out there,
        and still counted.

    Returns:
      A `Placement`.

    Examples:
      >>> maps = placement_maps(jnp.array([[1, 0, 1, 2]]), 3, 2)
      >>> maps.logical_to_physical_map.tolist(), maps.expert_count.tolist()
      ([[[1, -1], [0, 2], [3, -1]]], [[1, 2, 1]])
    """
    expert_LS = jnp.asarray(physical_to_logical_map, jnp.int32)
    return _maps(expert_LS, num_logical_experts, max_replicas)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _maps(
    expert_LS: jax.Array, num_logical_experts: int, max_replicas: int
) -> Placement:
    count_LE = jax.vmap(lambda e_S: count_replicas(e_S, num_logical_experts))(expert_LS)
    key_LS = jnp.where(expert_LS >= 0, expert_LS, num_logical_experts)
    slot_LS = jnp.argsort(key_LS, axis=1, stable=True).astype(jnp.int32)
    sorted_LS = jnp.take_along_axis(key_LS, slot_LS, axis=1)
    before_LE = jnp.cumsum(count_LE, axis=1) - count_LE
    position_S = jnp.arange(expert_LS.shape[1], dtype=jnp.int32)
    first_LS = jnp.take_along_axis(
        before_LE, jnp.minimum(sorted_LS, num_logical_experts - 1), axis=1
    )
    rank_LS = position_S[None] - first_LS
    slots_LEC = _slots_by_expert(
        sorted_LS, rank_LS, slot_LS, num_logical_experts, max_replicas
    )
    return Placement(expert_LS, slots_LEC, count_LE)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _greedy(
    weight_LE: jax.Array,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    width: int,
) -> Placement:
    expert_LS, rank_LS, count_LE = greedy_placement(
        weight_LE, num_replicas, num_groups, num_nodes, num_gpus
    )
    slot_LS = jnp.broadcast_to(
        jnp.arange(num_replicas, dtype=jnp.int32), expert_LS.shape
    )
    slots_LEC = _slots_by_expert(expert_LS, rank_LS, slot_LS, weight_LE.shape[1], width)
    return Placement(expert_LS, slots_LEC, count_LE)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _soft(
    weight_LE: jax.Array,
    capacity_G: jax.Array,
    remote_price: jax.Array | None,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    width: int,
) -> Placement:
    expert_LS = soft_placement(
        weight_LE,
        num_replicas,
        num_groups,
        num_nodes,
        num_gpus,
        capacity_G,
        remote_price,
    )
    return placement_maps(expert_LS, weight_LE.shape[1], width)


def _slots_by_expert(
    expert_LS: jax.Array,
    rank_LS: jax.Array,
    slot_LS: jax.Array,
    num_experts: int,
    width: int,
) -> jax.Array:
    num_layers = len(expert_LS)
    layer_L1 = jnp.arange(num_layers, dtype=jnp.int32)[:, None]
    index_LS = (layer_L1 * num_experts + expert_LS) * width + rank_LS
    size = num_layers * num_experts * width
    is_inside_LS = (expert_LS < num_experts) & (rank_LS < width)
    slots = jnp.full(size, -1, jnp.int32)
    slots = slots.at[jnp.where(is_inside_LS, index_LS, size)].set(
        slot_LS, mode="drop", wrap_negative_indices=False
    )
    return slots.reshape(num_layers, num_experts, width)


def _choose(policy: Policy, num_groups: int, num_nodes: int) -> Policy:
    is_nested = num_groups % num_nodes == 0
    if policy == "auto":
        return "hierarchical" if is_nested else "global"
    if policy in ("hierarchical", "soft") and not is_nested:
        raise ValueError(
            f"{policy=} packs whole groups to nodes, so {num_nodes=} must divide "
            f"{num_groups=}; use policy='global' or 'swaps'."
        )
    return policy


def _check_width(count_LE: jax.Array, max_replicas: int, check_values: bool) -> None:
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
