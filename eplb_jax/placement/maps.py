"""The maps between physical and logical experts, as arrays.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from eplb_jax.placement.arrays import count_replicas


def replicas_by_expert(
    expert_LS: jax.Array,
    rank_LS: jax.Array,
    physical_LS: jax.Array,
    num_experts: int,
    max_replicas: int,
) -> jax.Array:
    """Lists the replicas of each expert, by rank.

    Args:
      expert_LS: [layers, physical experts] int32, the expert of each; `num_experts` if
        empty.
      rank_LS: [layers, physical experts] int32, which of its replicas each is; those
        of rank `max_replicas` and above are left out.
      physical_LS: [layers, physical experts] int32, which physical expert each is.
      num_experts: logical experts.
      max_replicas: width of the result.

    Returns:
      [layers, num_experts, max_replicas] int32, a `logical_to_physical_map`.

    Examples:
      >>> first = jnp.array([[1, 0, 1]]), jnp.array([[0, 0, 1]]), jnp.array([[0, 1, 2]])
      >>> replicas_by_expert(*first, num_experts=2, max_replicas=2).tolist()
      [[[1, -1], [0, 2]]]
    """
    num_layers = len(expert_LS)
    layer_L1 = jnp.arange(num_layers, dtype=jnp.int32)[:, None]
    index_LS = (layer_L1 * num_experts + expert_LS) * max_replicas + rank_LS
    size = num_layers * num_experts * max_replicas
    is_inside_LS = (expert_LS < num_experts) & (rank_LS < max_replicas)
    flat = jnp.full(size, -1, jnp.int32)
    flat = flat.at[jnp.where(is_inside_LS, index_LS, size)].set(
        physical_LS, mode="drop", wrap_negative_indices=False
    )
    return flat.reshape(num_layers, num_experts, max_replicas)


@functools.partial(jax.jit, static_argnums=(1, 2))
def maps_of_placement(
    expert_LS: jax.Array, num_experts: int, max_replicas: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes the other two maps of a placement, the replicas of an expert in order.

    Args:
      expert_LS: [layers, physical experts] int32, -1 if empty.
      num_experts: logical experts.
      max_replicas: width of the second map; replicas beyond it are left out there,
        and still counted.

    Returns:
      The three maps of `ExpertTables`.

    Examples:
      >>> _, replicas, count = maps_of_placement(jnp.array([[1, 0, 1, 2]]), 3, 2)
      >>> replicas.tolist(), count.tolist()
      ([[[1, -1], [0, 2], [3, -1]]], [[1, 2, 1]])
    """
    count_LE = jax.vmap(lambda expert_S: count_replicas(expert_S, num_experts))(
        expert_LS
    )
    key_LS = jnp.where(expert_LS >= 0, expert_LS, num_experts)
    physical_LS = jnp.argsort(key_LS, axis=1, stable=True).astype(jnp.int32)
    sorted_LS = jnp.take_along_axis(key_LS, physical_LS, axis=1)
    before_LE = jnp.cumsum(count_LE, axis=1) - count_LE
    position_S = jnp.arange(expert_LS.shape[1], dtype=jnp.int32)
    first_LS = jnp.take_along_axis(
        before_LE, jnp.minimum(sorted_LS, num_experts - 1), axis=1
    )
    rank_LS = position_S[None] - first_LS
    physical_LER = replicas_by_expert(
        sorted_LS, rank_LS, physical_LS, num_experts, max_replicas
    )
    return expert_LS, physical_LER, count_LE
