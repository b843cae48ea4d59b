"""A mixture of experts for given routing: dispatch, grouped products, combine.

Plain functions and arrays, for any router and any module system.

Shape suffixes: see `eplb_jax`; here O slots of a device.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eplb_jax.layer.exact import (
    count_by_holder,
    count_fetched,
    count_moved,
    count_rows,
    plan_slots,
)
from eplb_jax.layer.expert_weights import ExpertWeights
from eplb_jax.layer.experts import Products
from eplb_jax.layer.ids import known_ids, merge_repeated
from eplb_jax.layer.parallel import ONE_DEVICE, ExpertParallel
from eplb_jax.layer.physical import physical_weights
from eplb_jax.layer.replicas import choose_physical_experts
from eplb_jax.layer.routes import Fetched, Networks, mix_physical
from eplb_jax.layer.routing import ROUTING
from eplb_jax.placement import ExpertTables, check_choices
from eplb_jax.products import Implementation, ScaledRows, scale_rows, unscale_rows

# Names of the values that a layer must keep so that its recomputation exchanges
# nothing: `jax.checkpoint_policies.save_only_these_names(*EXCHANGED)`.
EXCHANGED = (ROUTING, "moe_plan", "moe_rows")


class Mixed(NamedTuple):
    """What `mix_experts` returns, and more of `MoEStats`."""

    outputs: jax.Array
    tokens_per_physical_expert: jax.Array
    overflow: jax.Array
    device_rows: jax.Array
    num_fetched: jax.Array
    num_moved: jax.Array


def mix_experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    expert_weights: ExpertWeights,
    tables: ExpertTables | None = None,
    parallel: ExpertParallel = ONE_DEVICE,
    *,
    is_physical: bool = False,
    implementation: Implementation = "auto",
    products: Products = "plain",
    is_distinct: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the weighted sum of each token's experts.

    An expert that a token chooses several times computes it once, with the sum of the
    weights.

    Args:
      x: [tokens, d]; inside `jax.shard_map` this device's.
      experts: [tokens, top_k] logical experts; an id outside [0, experts), such as -1,
        for a token that is padding.
      weights: [tokens, top_k] float32 router weights.
      expert_weights: this device's share of the logical experts, or, with
        `is_physical`, those of its physical experts.
      tables: the tables of one layer; None: physical expert i is expert i.
      parallel: how physical experts are divided among devices.
      is_physical: whether `expert_weights` are gathered already.
      implementation: see `grouped_matmul`.
      products: see `MoE`.
      is_distinct: whether no token chooses an expert twice, as after a top-k; then
        choices are not compared with each other.

    Returns:
      outputs: [tokens, d], of the dtype of `x`.
      tokens_per_physical_expert: [physical experts] int32, see `MoEStats`.
      overflow: [] int32, see `MoEStats`.

    Raises:
      ValueError: for tables, weights and devices that do not fit each other.

    Examples:
      Two experts, of which the second computes both tokens:

      >>> ones = jnp.ones((2, 4, 4))
      >>> scale = jnp.array([1.0, 2.0])[:, None, None]
      >>> y, counts, overflow = mix_experts(
      ...     jnp.ones((2, 4)), jnp.array([[1], [1]]), jnp.ones((2, 1)),
      ...     ExpertWeights(ones, ones, ones * scale))
      >>> y.shape, counts.tolist(), int(overflow)
      ((2, 4), [0, 2], 0)
    """
    mixed = mix(
        x,
        experts,
        weights,
        expert_weights,
        tables,
        parallel,
        is_physical=is_physical,
        implementation=implementation,
        products=products,
        is_distinct=is_distinct,
    )
    return mixed.outputs, mixed.tokens_per_physical_expert, mixed.overflow


def mix(
    x: jax.Array | ScaledRows,
    experts: jax.Array,
    weights: jax.Array,
    expert_weights: ExpertWeights,
    tables: ExpertTables | None,
    parallel: ExpertParallel,
    *,
    is_physical: bool = False,
    implementation: Implementation = "auto",
    products: Products = "plain",
    is_distinct: bool = False,
    shared: ExpertWeights | None = None,
) -> Mixed:
    """Does what `mix_experts` says, and counts the rows of each device as well.

    `x` may be quantized already, if its payload and the products are float8.

    With exact balance, `shared` [1, ...] is an expert that all tokens go to, and that
    all devices hold; its rows are planned with the others.
    """
    p = parallel
    check_choices(products=(products, Products))
    if tables is None:
        num_physical_experts = expert_weights.num_experts * p.num_devices
        num_experts = num_physical_experts
    else:
        num_physical_experts = tables.num_physical_experts
        num_experts = tables.num_experts
    experts = known_ids(experts, num_experts)
    # The router sees padding too, and its weights may be NaN there.
    weights = jnp.where(experts >= 0, weights, 0.0)
    if not is_distinct:
        # By default a buffer has room for each token at each expert once.
        experts, weights = merge_repeated(experts, weights)
    if tables is not None:
        expert_weights = _hold(expert_weights, tables, p, is_physical)
    if products == "fp8" and p.payload == "fp8":
        x = scale_rows(x)  # what is sent is what is multiplied
    if not len(x):
        # Nothing to send, on any device: all have equally many tokens.
        counts = jnp.zeros(num_physical_experts, jnp.int32)
        none = jnp.zeros((), jnp.int32)
        device_rows = jnp.zeros(p.num_devices, jnp.int32)
        return Mixed(unscale_rows(x), counts, none, device_rows, none, none)
    networks = Networks(expert_weights, implementation, products)
    if p.is_exact:
        return _mix_exactly(x, experts, weights, networks, tables, p, shared)
    if tables is not None:
        experts = choose_physical_experts(
            experts,
            tables,
            choice=p.replica_choice,
            num_devices=p.num_devices,
            num_nodes=p.num_nodes,
            axis_name=p.axis_name,
        )
    outputs, counts, overflow = mix_physical(
        x, experts, weights, networks, num_physical_experts, p
    )
    device_rows = counts.reshape(p.num_devices, -1).sum(axis=1, dtype=jnp.int32)
    none = jnp.zeros((), jnp.int32)
    return Mixed(outputs, counts, overflow, device_rows, none, none)


def _hold(
    weights: ExpertWeights, tables: ExpertTables, p: ExpertParallel, is_physical: bool
) -> ExpertWeights:
    """From this device's experts to its physical experts, if they are not that yet."""
    if is_physical:
        _check_fit(weights, tables, p)
        return weights
    return physical_weights(
        weights,
        tables,
        num_devices=p.num_devices,
        axis_name=p.axis_name,
        transport=p.transport,
    )


def _mix_exactly(
    x: jax.Array | ScaledRows,
    experts: jax.Array,
    weights: jax.Array,
    networks: Networks,
    tables: ExpertTables | None,
    p: ExpertParallel,
    shared: ExpertWeights | None,
) -> Mixed:
    """Mixes with slots, see `eplb_jax.layer.exact`, in place of physical experts."""
    assert p.axis_name is not None
    if tables is None:
        num_experts = networks.weights.num_experts * p.num_devices
        tables = ExpertTables.in_order(num_experts)
    if shared is not None:
        # It comes after the others, of the choices as of the experts of a device.
        is_token_T1 = (experts >= 0).any(axis=1, keepdims=True)
        chosen_T1 = jnp.where(is_token_T1, tables.num_experts, -1)
        experts = jnp.concatenate([experts, chosen_T1], axis=1)
        weights = jnp.concatenate([weights, is_token_T1.astype(weights.dtype)], axis=1)
        held = jax.tree.map(
            lambda held, one: jnp.concatenate([held, one.astype(held.dtype)]),
            networks.weights,
            shared,
        )
        networks = networks._replace(weights=held)
    num_rows = count_rows(experts.size, p)
    with jax.named_scope("plan"):
        slots = plan_slots(experts, tables, p, num_shared=int(shared is not None))
        slots = checkpoint_name(slots, "moe_plan")
    rows_DO = slots.plan.rows.reshape(p.num_devices, -1)
    outputs, counts, overflow = mix_physical(
        x,
        slots.slots,
        weights,
        networks._replace(fetched=Fetched(slots.fetch, p.axis_name, rows_DO)),
        rows_DO.shape[1],
        dataclasses.replace(p, num_rows=num_rows),
    )
    return Mixed(
        outputs,
        count_by_holder(counts, slots.plan, tables.num_physical_experts, p.axis_name),
        overflow,
        counts.reshape(p.num_devices, -1).sum(axis=1, dtype=jnp.int32),
        count_fetched(slots.plan, p.axis_name),
        count_moved(slots.plan, p.axis_name),
    )


def _check_fit(
    weights: ExpertWeights,
    tables: ExpertTables,
    parallel: ExpertParallel,
) -> None:
    held = weights.num_experts
    if held * parallel.num_devices != tables.num_physical_experts:
        raise ValueError(
            f"weights of {held} physical experts per device do not fit tables of "
            f"{tables.num_physical_experts} physical experts on {parallel.num_devices} "
            "devices; gather them with physical_weights and these tables."
        )
