"""The routes of tokens to physical experts and back: directly, or by nodes.

Shape suffixes: see `eplb_jax`; here C choices of all tokens, C = T * K.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eplb_jax.layer.axes import Axis, Groups, all_gather, axis_index, psum
from eplb_jax.layer.choices import combine_choices, dispatch_choices
from eplb_jax.layer.dispatch import combine, dispatch_scaled, dispatch_tokens
from eplb_jax.layer.dispatch_plan import DispatchPlan, plan_dispatch
from eplb_jax.layer.exchange import Transport
from eplb_jax.layer.expert_weights import ExpertWeights
from eplb_jax.layer.experts import Products, run_experts, run_scaled_experts
from eplb_jax.layer.fetch import Fetch, add_fetched
from eplb_jax.layer.ids import is_repeated
from eplb_jax.layer.parallel import ExpertParallel
from eplb_jax.layer.payload import Payload
from eplb_jax.products import Implementation, ScaledRows, named_rows


class Fetched(NamedTuple):
    """What slots have in addition to physical experts.

    Attributes:
      plan: from where this device fetches weights; None if it has no extra slots.
      axis_name: mesh axis of the devices.
      counts: [devices, slots] int32, see `plan_dispatch`.
    """

    plan: Fetch | None
    axis_name: str
    counts: jax.Array | None

    def add(self, weight: jax.Array, dtype: Any, transport: Transport) -> jax.Array:
        """From the weights of a device's physical experts to those of its slots."""
        if self.plan is None:
            return weight
        return add_fetched(
            weight,
            self.plan,
            dtype=dtype,
            axis_name=self.axis_name,
            transport=transport,
        )


class Networks(NamedTuple):
    """What a device computes rows with.

    Attributes:
      weights: of its physical experts.
      implementation: see `grouped_matmul`.
      products: see `MoE`.
      fetched: with exact balance, what its slots have beside these.
    """

    weights: ExpertWeights
    implementation: Implementation
    products: Products
    fetched: Fetched | None = None


def mix_physical(
    x: jax.Array | ScaledRows,
    physical_experts: jax.Array,
    weights: jax.Array,
    networks: Networks,
    num_physical_experts: int,
    p: ExpertParallel,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Like `mix_experts`, for choices of physical experts, by the route of `p`."""
    mix = _mix_by_node if p.route == "by_node" and p.num_nodes > 1 else _mix_directly
    return mix(
        x, physical_experts, weights, networks, num_physical_experts, p, p.axis_name
    )


def _mix_by_node(
    x: jax.Array | ScaledRows,
    physical_experts: jax.Array,
    weights: jax.Array,
    networks: Networks,
    num_physical_experts: int,
    p: ExpertParallel,
    axis: Axis | None,
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
        rows = _dispatch(x, plan, p.payload, way)
        # Counted from 1, since an empty row is zero.
        physical_TK = (physical_experts + 1).astype(jnp.float32)
        routing = jnp.concatenate([physical_TK, weights], axis=1)
        routing = dispatch_tokens(routing, plan, **way)
        routing = checkpoint_name(routing, "moe_rows")
    physical_MK, weight_MK = jnp.split(routing, 2, axis=1)
    physical_MK = physical_MK.astype(jnp.int32) - 1 - axis_index(across) * per_node
    is_here_MK = (physical_MK >= 0) & (physical_MK < per_node)
    if networks.fetched is not None:
        # In a node choices are others: those that came to its devices.
        fetched = networks.fetched._replace(counts=None)
        networks = networks._replace(fetched=fetched)
    results, count_I, overflow = _mix_directly(
        rows,
        jnp.where(is_here_MK, physical_MK, -1),
        jnp.where(is_here_MK, weight_MK, 0.0),
        networks,
        per_node,
        dataclasses.replace(p, num_devices=p.num_devices // num_nodes, num_nodes=1),
        node,
    )
    with jax.named_scope("combine"):
        outputs = combine(results, plan, len(x), **way).astype(x.dtype)
    tokens_per_physical_expert = all_gather(count_I, across).reshape(-1)
    return (
        outputs,
        tokens_per_physical_expert,
        psum(plan.overflow, node) + psum(overflow, across),
    )


def _dispatch(
    x: jax.Array | ScaledRows, plan: DispatchPlan, payload: Payload, way: dict[str, Any]
) -> jax.Array | ScaledRows:
    """Brings tokens to experts, or to nodes; names what then need not be sent again."""
    if isinstance(x, ScaledRows):
        return named_rows(dispatch_scaled(x, plan, **way), "moe_rows")
    rows = dispatch_tokens(x, plan, payload=payload, **way)
    return checkpoint_name(rows, "moe_rows")


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
    x: jax.Array | ScaledRows,
    physical_experts: jax.Array,
    weights: jax.Array,
    networks: Networks,
    num_physical_experts: int,
    p: ExpertParallel,
    axis: Axis | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Like `mix_experts`, for choices of physical experts of the devices of an axis."""
    fetched = networks.fetched
    # What a device forwards is not evened out.
    is_limited = p.route == "by_node" and fetched is None
    plan = plan_dispatch(
        physical_experts,
        num_physical_experts,
        num_devices=p.num_devices,
        axis_name=axis,
        num_rows=p.num_rows,
        num_sent=p.num_rows if is_limited else None,
        is_distinct=True,
        counts=None if fetched is None else fetched.counts,
    )
    plan = checkpoint_name(plan, "moe_plan")
    way = {"axis_name": axis, "transport": p.transport}

    def hold(weight: jax.Array, dtype: Any) -> jax.Array:
        if fetched is None:
            return weight
        return fetched.add(weight, dtype, p.transport)

    run = functools.partial(
        run_scaled_experts if networks.products == "fp8" else run_experts,
        hold=hold,
        group_sizes=plan.group_sizes,
        implementation=networks.implementation,
        # Then the backward pass fetches weights again.
        refetch=fetched is not None and not (p.keep_fetched or p.remat),
    )
    is_before = p.apply_scores == "before"
    with jax.named_scope("dispatch"):
        rows, weights_M1 = _dispatch(x, plan, p.payload, way), None
        if is_before:
            weights_M1 = dispatch_choices(weights.reshape(-1, 1), plan, **way)
            weights_M1 = checkpoint_name(weights_M1, "moe_rows")

    with jax.named_scope("mlp"):
        if p.remat:
            run = jax.checkpoint(run)
        results = run(rows, weights_M1, networks.weights)
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
