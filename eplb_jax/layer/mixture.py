"""Experts mixed as a router says: dispatch, grouped products, and the way back.

Plain functions and arrays, for any router and any module system.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from eplb_jax.layer.axes import Axis, Groups, all_gather, axis_index, psum
from eplb_jax.layer.dispatch import (
    Payload,
    combine,
    dispatch_choices,
    fetch,
    plan_dispatch,
    send,
)
from eplb_jax.layer.exchange import Transport
from eplb_jax.layer.grouped_products import Implementation, grouped_matmul
from eplb_jax.layer.physical import physical_weights
from eplb_jax.layer.replicas import ReplicaChoice, choose_physical_experts
from eplb_jax.layer.routing import ROUTING
from eplb_jax.placement import ExpertTables

Route = Literal["direct", "by_node"]

# Names of what a layer must keep so that computing it again exchanges nothing: for
# `jax.checkpoint_policies.save_only_these_names(*EXCHANGED)`.
EXCHANGED = (ROUTING, "moe_plan", "moe_rows")


class ExpertWeights(NamedTuple):
    """SwiGLU experts: `down(silu(gate(x)) * up(x))`, without biases.

    Attributes:
      gate: [experts, d, hidden].
      up: [experts, d, hidden].
      down: [experts, hidden, d].
    """

    gate: Any
    up: Any
    down: Any


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """How a layer's slots are divided among devices.

    Attributes:
      axis_name: mesh axis, inside `jax.shard_map`; None: one device.
      num_devices: its size.
      num_nodes: nodes that its devices are divided among, in order; for
        `replica_choice="nearest"`.
      replica_choice: see `choose_physical_experts`.
      num_rows: rows of a device's buffer; None: as many as can come, see
        `plan_dispatch`.
      transport: see `exchange`.
      payload: see `send`.
      remat: keep the rows that came to the experts, and compute what is inside these
        again in the backward pass.
      weigh: where results get the weights of their choices. `"experts"` sends these
        along; `"tokens"` sends nothing more, but a backward pass would have to keep
        all results: for serving.
      route: `"direct"` sends a token to each of its slots. `"by_node"` sends it once to
        each node that has any of them, to the device with the sender's place there,
        which hands it on inside its node and adds up what comes back (DeepSeek-V3
        report, arXiv:2412.19437, section 3.2.2): fewer bytes between nodes, and more
        exchanges.
    """

    axis_name: str | None = None
    num_devices: int = 1
    num_nodes: int = 1
    replica_choice: ReplicaChoice = "spread"
    num_rows: int | None = None
    transport: Transport = "auto"
    payload: Payload = "plain"
    remat: bool = False
    weigh: Literal["experts", "tokens"] = "experts"
    route: Route = "direct"


ONE_DEVICE = ExpertParallel()


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each token's experts, weighted and added.

    Args:
      x: [tokens, d]; inside `jax.shard_map` this device's.
      experts: [tokens, k] int32 logical experts; -1 for a token that is padding.
      weights: [tokens, k] float32.
      expert_weights: this device's share of the logical experts, or, with
        `is_physical`, those of its slots.
      tables: of one layer; None: slot i is expert i.
      parallel: how slots are divided among devices.
      is_physical: whether `expert_weights` were gathered before.
      implementation: see `grouped_matmul`.

    Returns:
      outputs: [tokens, d], of the dtype of `x`.
      tokens_per_physical_expert: [slots] int32, see `MoEStats`.
      overflow: [] int32, see `MoEStats`.

    Raises:
      ValueError: for tables, weights and devices that do not fit.

    Examples:
      Two experts, of which the second does all the work of two tokens:

      >>> ones = jnp.ones((2, 4, 4))
      >>> scale = jnp.array([1.0, 2.0])[:, None, None]
      >>> y, counts, overflow = mix_experts(
      ...     jnp.ones((2, 4)), jnp.array([[1], [1]]), jnp.ones((2, 1)),
      ...     ExpertWeights(ones, ones, ones * scale))
      >>> y.shape, counts.tolist(), int(overflow)
      ((2, 4), [0, 2], 0)
    """
    p = parallel
    if tables is None:
        slots = experts
        num_slots = expert_weights.gate.shape[0] * p.num_devices
    else:
        if is_physical:
            _check_fit(expert_weights, tables, p)
        num_slots = tables.num_physical_experts
        slots = choose_physical_experts(
            experts,
            tables,
            choice=p.replica_choice,
            num_devices=p.num_devices,
            num_nodes=p.num_nodes,
            axis_name=p.axis_name,
        )
        if not is_physical:
            expert_weights = physical_weights(
                expert_weights,
                tables,
                num_devices=p.num_devices,
                axis_name=p.axis_name,
                transport=p.transport,
            )
    # A router sees padding too, and may have made NaN of it.
    weights = jnp.where(experts >= 0, weights, 0.0)
    mix = _mix_by_node if p.route == "by_node" and p.num_nodes > 1 else _mix_slots
    return mix(
        x, slots, weights, expert_weights, num_slots, p, p.axis_name, implementation
    )


def _mix_by_node(
    x: jax.Array,
    slots: jax.Array,
    weights: jax.Array,
    expert_weights: ExpertWeights,
    num_slots: int,
    p: ExpertParallel,
    axis: Axis | None,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `_mix_slots`, over the devices of all nodes: a token is sent to nodes, as to
    slots, and a node's devices do the same with the slots that it has.
    """
    assert isinstance(axis, str)
    num_nodes, per_node = p.num_nodes, num_slots // p.num_nodes
    across = Groups.across_nodes(axis, p.num_devices, num_nodes)
    node = Groups.nodes(axis, p.num_devices, num_nodes)
    way = {"axis_name": across, "transport": p.transport}
    plan = plan_dispatch(
        _nodes_of(slots, per_node, num_nodes),
        num_nodes,
        num_devices=num_nodes,
        axis_name=across,
    )
    plan = checkpoint_name(plan, "moe_plan")
    with jax.named_scope("dispatch"):
        rows = send(x, plan, payload=p.payload, **way)
        # From 1, since an empty row is zero.
        known = jnp.concatenate([(slots + 1).astype(jnp.float32), weights], axis=1)
        known = send(known, plan, **way)
        rows, known = checkpoint_name((rows, known), "moe_rows")
    slot_MK, weight_MK = jnp.split(known, 2, axis=1)
    slot_MK = slot_MK.astype(jnp.int32) - 1 - axis_index(across) * per_node
    is_here_MK = (slot_MK >= 0) & (slot_MK < per_node)
    results, counts_S, overflow = _mix_slots(
        rows,
        jnp.where(is_here_MK, slot_MK, -1),
        jnp.where(is_here_MK, weight_MK, 0.0),
        expert_weights,
        per_node,
        dataclasses.replace(p, num_devices=p.num_devices // num_nodes),
        node,
        implementation,
    )
    with jax.named_scope("combine"):
        outputs = combine(results, plan, len(x), **way).astype(x.dtype)
    tokens_per_physical_expert = all_gather(counts_S, across).reshape(-1)
    return (
        outputs,
        tokens_per_physical_expert,
        psum(plan.overflow, node) + psum(overflow, across),
    )


def _nodes_of(slots_TK: jax.Array, per_node: int, num_nodes: int) -> jax.Array:
    """[T, n] int32, the nodes that a token's slots are on, each once; -1 for none."""
    node_TK = jnp.where(slots_TK < 0, -1, slots_TK // per_node)
    num_choices = slots_TK.shape[1]
    if num_nodes < num_choices:
        node_N = jnp.arange(num_nodes, dtype=jnp.int32)
        is_asked_TN = (node_TK[:, :, None] == node_N[None, None]).any(axis=1)
        return jnp.where(is_asked_TN, node_N[None], -1)
    is_same_TKK = node_TK[:, :, None] == node_TK[:, None]
    is_before_KK = np.tri(num_choices, k=-1, dtype=bool)
    is_again_TK = (is_same_TKK & is_before_KK[None]).any(axis=2)
    return jnp.where(is_again_TK, -1, node_TK)


def _mix_slots(
    x: jax.Array,
    slots: jax.Array,
    weights: jax.Array,
    expert_weights: ExpertWeights,
    num_slots: int,
    p: ExpertParallel,
    axis: Axis | None,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `mix_experts`, for choices of slots of the devices of an axis."""
    plan = plan_dispatch(
        slots,
        num_slots,
        num_devices=p.num_devices,
        axis_name=axis,
        num_rows=p.num_rows,
        num_sent=p.num_rows if p.route == "by_node" else None,
    )
    plan = checkpoint_name(plan, "moe_plan")
    way = {"axis_name": axis, "transport": p.transport}

    def multiply(rows: jax.Array, weight: jax.Array) -> jax.Array:
        weight = weight.astype(rows.dtype)
        return grouped_matmul(
            rows, weight, plan.group_sizes, implementation=implementation
        )

    sends_weights = p.weigh == "experts"
    with jax.named_scope("dispatch"):
        rows, weights_M1 = send(x, plan, payload=p.payload, **way), None
        if sends_weights:
            weights_M1 = dispatch_choices(weights.reshape(-1, 1), plan, **way)
        rows, weights_M1 = checkpoint_name((rows, weights_M1), "moe_rows")

    def run(
        rows: jax.Array, weights_M1: jax.Array | None, e: ExpertWeights
    ) -> jax.Array:
        hidden = jax.nn.silu(multiply(rows, e.gate)) * multiply(rows, e.up)
        if weights_M1 is not None:
            # Here and not where the results are added up: their gradient would need all
            # results again, which are several times as wide.
            hidden = (hidden.astype(jnp.float32) * weights_M1).astype(hidden.dtype)
        return multiply(hidden, e.down)

    with jax.named_scope("mlp"):
        if p.remat:
            run = jax.checkpoint(run)
        results = run(rows, weights_M1, expert_weights)
    with jax.named_scope("combine"):
        if sends_weights:
            outputs = combine(results, plan, len(x), **way)
        else:
            choice_TKD = fetch(results, plan, **way).reshape(*slots.shape, -1)
            # No product of matrices, which would not be fused with the gather.
            outputs = (choice_TKD.astype(jnp.float32) * weights[..., None]).sum(axis=1)
        outputs = outputs.astype(x.dtype)
    return outputs, plan.tokens_per_physical_expert, plan.overflow


def _check_fit(
    weights: ExpertWeights,
    tables: ExpertTables,
    parallel: ExpertParallel,
) -> None:
    held = weights.gate.shape[0]
    if held * parallel.num_devices != tables.num_physical_experts:
        raise ValueError(
            f"physical weights of {held} slots a device do not fit tables of "
            f"{tables.num_physical_experts} slots on {parallel.num_devices} devices; "
            "gather them anew with physical_weights."
        )
