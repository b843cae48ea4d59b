"""A mixture of experts for given routing: dispatch, grouped products, combine.

Plain functions and arrays, for any router and any module system.

Shape suffixes: see `eplb_jax`; here C choices of all tokens, C = T * K.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eplb_jax.layer.axes import Axis, Groups, all_gather, axis_index, psum
from eplb_jax.layer.choices import combine_choices, dispatch_choices
from eplb_jax.layer.dispatch import combine, dispatch_tokens
from eplb_jax.layer.dispatch_plan import plan_dispatch
from eplb_jax.layer.grouped_products import Implementation, grouped_matmul
from eplb_jax.layer.ids import is_repeated, known_ids, merge_repeated
from eplb_jax.layer.parallel import ONE_DEVICE, ExpertParallel
from eplb_jax.layer.physical import physical_weights
from eplb_jax.layer.replicas import choose_physical_experts
from eplb_jax.layer.routing import ROUTING
from eplb_jax.placement import ExpertTables

# Names of the values that a layer must keep so that its recomputation exchanges
# nothing: `jax.checkpoint_policies.save_only_these_names(*EXCHANGED)`.
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
    p = parallel
    if tables is None:
        num_physical_experts = expert_weights.gate.shape[0] * p.num_devices
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
        experts, expert_weights = _place(
            experts, expert_weights, tables, p, is_physical
        )
    if not len(x):
        # Nothing to send, on any device: all have equally many tokens.
        counts = jnp.zeros(num_physical_experts, jnp.int32)
        return x, counts, jnp.zeros((), jnp.int32)
    mix = _mix_by_node if p.route == "by_node" and p.num_nodes > 1 else _mix_directly
    return mix(
        x,
        experts,
        weights,
        expert_weights,
        num_physical_experts,
        p,
        p.axis_name,
        implementation,
    )


def _place(
    experts: jax.Array,
    weights: ExpertWeights,
    tables: ExpertTables,
    p: ExpertParallel,
    is_physical: bool,
) -> tuple[jax.Array, ExpertWeights]:
    """From experts to physical experts: the choices, and this device's weights."""
    if is_physical:
        _check_fit(weights, tables, p)
    physical_experts = choose_physical_experts(
        experts,
        tables,
        choice=p.replica_choice,
        num_devices=p.num_devices,
        num_nodes=p.num_nodes,
        axis_name=p.axis_name,
    )
    if not is_physical:
        weights = physical_weights(
            weights,
            tables,
            num_devices=p.num_devices,
            axis_name=p.axis_name,
            transport=p.transport,
        )
    return physical_experts, weights


def _mix_by_node(
    x: jax.Array,
    physical_experts: jax.Array,
    weights: jax.Array,
    expert_weights: ExpertWeights,
    num_physical_experts: int,
    p: ExpertParallel,
    axis: Axis | None,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Like `_mix_directly`, in two hops: to nodes, then inside each node.

    The first hop is a dispatch to nodes as if they were experts; the second one is
    `_mix_directly` over the devices of a node.
    """
    assert isinstance(axis, str)
    num_nodes, per_node = p.num_nodes, num_physical_experts // p.num_nodes
    across = Groups.across_nodes(axis, p.num_devices, num_nodes)
    node = Groups.nodes(axis, p.num_devices, num_nodes)
    way = {"axis_name": across, "transport": p.transport}
    plan = plan_dispatch(
        _nodes_of(physical_experts, per_node, num_nodes),
        num_nodes,
        num_devices=num_nodes,
        axis_name=across,
        is_distinct=True,
    )
    plan = checkpoint_name(plan, "moe_plan")
    with jax.named_scope("dispatch"):
        rows = dispatch_tokens(x, plan, payload=p.payload, **way)
        # Counted from 1, since an empty row is zero.
        physical_TK = (physical_experts + 1).astype(jnp.float32)
        routing = jnp.concatenate([physical_TK, weights], axis=1)
        routing = dispatch_tokens(routing, plan, **way)
        rows, routing = checkpoint_name((rows, routing), "moe_rows")
    physical_MK, weight_MK = jnp.split(routing, 2, axis=1)
    physical_MK = physical_MK.astype(jnp.int32) - 1 - axis_index(across) * per_node
    is_here_MK = (physical_MK >= 0) & (physical_MK < per_node)
    results, count_I, overflow = _mix_directly(
        rows,
        jnp.where(is_here_MK, physical_MK, -1),
        jnp.where(is_here_MK, weight_MK, 0.0),
        expert_weights,
        per_node,
        dataclasses.replace(p, num_devices=p.num_devices // num_nodes, num_nodes=1),
        node,
        implementation,
    )
    with jax.named_scope("combine"):
        outputs = combine(results, plan, len(x), **way).astype(x.dtype)
    tokens_per_physical_expert = all_gather(count_I, across).reshape(-1)
    return (
        outputs,
        tokens_per_physical_expert,
        psum(plan.overflow, node) + psum(overflow, across),
    )


def _nodes_of(physical_TK: jax.Array, per_node: int, num_nodes: int) -> jax.Array:
    """The nodes of a token's physical experts, each once; -1 elsewhere.

    Returns:
      [tokens, n] int32, n the smaller of top_k and the number of nodes.
    """
    node_TK = jnp.where(physical_TK < 0, -1, physical_TK // per_node)
    top_k = physical_TK.shape[1]
    if num_nodes < top_k:
        node_N = jnp.arange(num_nodes, dtype=jnp.int32)
        is_used_TN = (node_TK[:, :, None] == node_N[None, None]).any(axis=1)
        return jnp.where(is_used_TN, node_N[None], -1)
    return jnp.where(is_repeated(node_TK), -1, node_TK)


def _mix_directly(
    x: jax.Array,
    physical_experts: jax.Array,
    weights: jax.Array,
    expert_weights: ExpertWeights,
    num_physical_experts: int,
    p: ExpertParallel,
    axis: Axis | None,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Like `mix_experts`, for choices of physical experts of the devices of an axis."""
    plan = plan_dispatch(
        physical_experts,
        num_physical_experts,
        num_devices=p.num_devices,
        axis_name=axis,
        num_rows=p.num_rows,
        num_sent=p.num_rows if p.route == "by_node" else None,
        is_distinct=True,
    )
    plan = checkpoint_name(plan, "moe_plan")
    way = {"axis_name": axis, "transport": p.transport}

    def multiply(rows: jax.Array, weight: jax.Array) -> jax.Array:
        weight = weight.astype(rows.dtype)
        return grouped_matmul(
            rows, weight, plan.group_sizes, implementation=implementation
        )

    is_before = p.apply_scores == "before"
    with jax.named_scope("dispatch"):
        rows, weights_M1 = dispatch_tokens(x, plan, payload=p.payload, **way), None
        if is_before:
            weights_M1 = dispatch_choices(weights.reshape(-1, 1), plan, **way)
        rows, weights_M1 = checkpoint_name((rows, weights_M1), "moe_rows")

    def run(
        rows: jax.Array, weights_M1: jax.Array | None, e: ExpertWeights
    ) -> jax.Array:
        hidden = jax.nn.silu(multiply(rows, e.gate)) * multiply(rows, e.up)
        if weights_M1 is not None:
            # Here and not after the last product: there, the gradient of the weights
            # would need the outputs again, which are several times as wide.
            hidden = (hidden.astype(jnp.float32) * weights_M1).astype(hidden.dtype)
        return multiply(hidden, e.down)

    with jax.named_scope("mlp"):
        if p.remat:
            run = jax.checkpoint(run)
        results = run(rows, weights_M1, expert_weights)
    with jax.named_scope("combine"):
        if is_before:
            outputs = combine(results, plan, len(x), **way)
        else:
            choice_CF = combine_choices(results, plan, **way)
            choice_TKF = choice_CF.reshape(*physical_experts.shape, -1)
            # Not a matrix product, which would not be fused with the gather.
            outputs = (choice_TKF.astype(jnp.float32) * weights[..., None]).sum(axis=1)
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
            f"weights of {held} physical experts per device do not fit tables of "
            f"{tables.num_physical_experts} physical experts on {parallel.num_devices} "
            "devices; gather them with physical_weights and these tables."
        )
