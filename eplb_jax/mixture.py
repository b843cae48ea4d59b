"""Experts mixed as a router says: dispatch, grouped products, and the way back.

Plain functions and arrays, for any router and any module system.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eplb_jax.dispatch import (
    Payload,
    combine,
    fetch,
    plan_dispatch,
    send,
    send_choices,
)
from eplb_jax.exchange import Transport
from eplb_jax.grouped_matmul import Implementation, grouped_matmul
from eplb_jax.physical import physical_weights
from eplb_jax.replicas import ReplicaChoice, choose_slots
from eplb_jax.routing import ROUTING
from eplb_jax.tables import ExpertTables

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
      replica_choice: see `choose_slots`.
      num_rows: rows of a device's buffer; None: as many as can come, see
        `plan_dispatch`.
      transport: see `exchange`.
      payload: see `send`.
      remat: keep the rows that came to the experts, and compute what is inside these
        again in the backward pass.
      weigh: where results get the weights of their choices. `"experts"` sends these
        along; `"tokens"` sends nothing more, but a backward pass would have to keep
        all results: for serving.
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
      slot_counts: [slots] int32, see `MoEStats`.
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
        num_slots = tables.num_slots
        slots = choose_slots(
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
    plan = plan_dispatch(
        slots,
        num_slots,
        num_devices=p.num_devices,
        axis_name=p.axis_name,
        num_rows=p.num_rows,
    )
    plan = checkpoint_name(plan, "moe_plan")
    way = {"axis_name": p.axis_name, "transport": p.transport}

    def multiply(rows: jax.Array, weight: jax.Array) -> jax.Array:
        weight = weight.astype(rows.dtype)
        return grouped_matmul(
            rows, weight, plan.group_sizes, implementation=implementation
        )

    # A router sees padding too, and may have made NaN of it.
    weights = jnp.where(experts >= 0, weights, 0.0)
    sends_weights = p.weigh == "experts"
    with jax.named_scope("dispatch"):
        rows, weights_M1 = send(x, plan, payload=p.payload, **way), None
        if sends_weights:
            weights_M1 = send_choices(weights.reshape(-1, 1), plan, **way)
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
            choice_TKD = fetch(results, plan, **way).reshape(*experts.shape, -1)
            outputs = jnp.einsum("tkd,tk->td", choice_TKD.astype(jnp.float32), weights)
        outputs = outputs.astype(x.dtype)
    return outputs, plan.slot_counts, plan.overflow


def _check_fit(
    weights: ExpertWeights,
    tables: ExpertTables,
    parallel: ExpertParallel,
) -> None:
    held = weights.gate.shape[0]
    if held * parallel.num_devices != tables.num_slots:
        raise ValueError(
            f"physical weights of {held} slots a device do not fit tables of "
            f"{tables.num_slots} slots on {parallel.num_devices} devices; gather them "
            "anew with physical_weights."
        )
