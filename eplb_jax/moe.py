"""A mixture of experts as a Flax NNX module, and the function underneath it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from eplb_jax.dispatch import Payload, fetch, plan_dispatch, send
from eplb_jax.exchange import Transport
from eplb_jax.grouped_matmul import Implementation, grouped_matmul
from eplb_jax.physical import physical_weights
from eplb_jax.replicas import ReplicaChoice, choose_slots
from eplb_jax.routing import (
    Routing,
    count_experts,
    sequence_balance_loss,
    sigmoid_group_top_k,
    softmax_top_k,
)
from eplb_jax.tables import ExpertTables


class RouterBias(nnx.Variable):
    """What only the choice of experts sees; changed by `update_bias`, not by AD."""


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


class MoEStats(NamedTuple):
    """What a layer has to tell, the same on all devices of the expert axis.

    Attributes:
      expert_counts: [experts] int32, tokens that chose each expert: what the load
        estimators of `eplb_jax.load` take.
      slot_counts: [slots] int32, tokens that each slot was to compute.
      overflow: [] int32, choices that found no room in a buffer and count as zero.
      balance_loss: [] float32, `sequence_balance_loss`, mean over this device's
        sequences; 1 is even.
    """

    expert_counts: jax.Array
    slot_counts: jax.Array
    overflow: jax.Array
    balance_loss: jax.Array


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
    """

    axis_name: str | None = None
    num_devices: int = 1
    num_nodes: int = 1
    replica_choice: ReplicaChoice = "spread"
    num_rows: int | None = None
    transport: Transport = "auto"
    payload: Payload = "plain"


def mix_experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    expert_weights: ExpertWeights,
    tables: ExpertTables | None = None,
    parallel: ExpertParallel = ExpertParallel(),
    *,
    is_physical: bool = False,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each token's experts, weighted and added: for any router, and any module system.

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
        _check_fit(expert_weights, tables, p, is_physical)
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
    way = {"axis_name": p.axis_name, "transport": p.transport}

    def multiply(rows: jax.Array, weight: jax.Array) -> jax.Array:
        weight = weight.astype(rows.dtype)
        return grouped_matmul(
            rows, weight, plan.group_sizes, implementation=implementation
        )

    rows = send(x, plan, payload=p.payload, **way)
    hidden = jax.nn.silu(multiply(rows, expert_weights.gate))
    hidden = hidden * multiply(rows, expert_weights.up)
    choices = fetch(multiply(hidden, expert_weights.down), plan, **way)
    # A router sees padding too, and may have made NaN of it.
    weights = jnp.where(experts >= 0, weights, 0.0)
    choices_TKD = choices.reshape(*experts.shape, -1).astype(jnp.float32)
    outputs = (choices_TKD * weights[..., None]).sum(axis=1).astype(x.dtype)
    return outputs, plan.slot_counts, plan.overflow


class MoE(nnx.Module):
    """Router, routed experts and shared experts.

    Parameters are logical: one copy of each expert, whatever the placement. On a mesh
    the module runs inside `jax.shard_map`, with the leaves of `experts` divided along
    their first axis and everything else replicated (gradients of what is replicated
    then have to be added up over the axis, as `pipeline_value_and_grad` does).

    Attributes:
      router: [d, experts] float32 parameter.
      bias: [experts] `RouterBias`, for the sigmoid router; else None.
      experts: `ExpertWeights` of parameters.
      shared: `ExpertWeights` of parameters, one wide expert; or None.

    Examples:
      Eight experts in ten slots, two of them for second replicas:

      >>> layer = MoE(16, 32, num_experts=8, k=2, rngs=nnx.Rngs(0))
      >>> slots = jnp.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1])
      >>> tables = ExpertTables.from_placement(slots, 8)
      >>> step = nnx.jit(lambda layer, x, tables: layer(x, tables))
      >>> y, stats = step(layer, jnp.ones((3, 5, 16)), tables)
      >>> y.shape, stats.slot_counts.shape, int(stats.expert_counts.sum())
      ((3, 5, 16), (10,), 30)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        num_experts: int,
        k: int,
        num_shared: int = 0,
        router: Literal["sigmoid", "softmax"] = "sigmoid",
        num_groups: int = 1,
        topk_groups: int = 1,
        normalize: bool = True,
        scaling: float = 1.0,
        parallel: ExpertParallel = ExpertParallel(),
        implementation: Implementation = "auto",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters.

        Args:
          dim: features of a token, d.
          hidden: features inside an expert.
          num_experts: routed experts.
          k: experts a token.
          num_shared: experts that every token goes to, with weight 1.
          router: `"sigmoid"` is DeepSeek-V3's, see `sigmoid_group_top_k`; `"softmax"`
            is `softmax_top_k`.
          num_groups: of the sigmoid router.
          topk_groups: of the sigmoid router.
          normalize: whether a token's weights add up to 1, before `scaling`.
          scaling: what they are multiplied with.
          parallel: how the slots are divided among devices.
          implementation: see `grouped_matmul`.
          dtype: of the experts' arithmetic; None: that of the input.
          param_dtype: of the experts' parameters. The router's are float32.
          rngs: for `params`.

        Raises:
          ValueError: for sizes that do not fit.
        """
        if router not in ("sigmoid", "softmax"):
            raise ValueError(f"{router=} must be 'sigmoid' or 'softmax'.")
        if router == "softmax" and num_groups != 1:
            raise ValueError(f"{num_groups=} belongs to router='sigmoid'.")
        if num_experts % parallel.num_devices:
            raise ValueError(
                f"parallel.num_devices={parallel.num_devices} must divide "
                f"{num_experts=}."
            )
        self.num_experts, self.k, self.kind = num_experts, k, router
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.normalize, self.scaling = normalize, scaling
        self.parallel = parallel
        self.implementation: Implementation = implementation
        self.dtype = dtype
        initial = nnx.initializers.lecun_normal()
        batched = nnx.initializers.lecun_normal(batch_axis=0)
        key = rngs.params
        self.router = nnx.Param(initial(key(), (dim, num_experts), jnp.float32))
        is_biased = router == "sigmoid"
        self.bias = RouterBias(jnp.zeros(num_experts)) if is_biased else None

        def make(count: int, hidden: int) -> ExpertWeights:
            into, out = (count, dim, hidden), (count, hidden, dim)
            shapes = ExpertWeights(into, into, out)
            return ExpertWeights(
                *(nnx.Param(batched(key(), shape, param_dtype)) for shape in shapes)
            )

        self.experts = nnx.data(make(num_experts, hidden))
        self.shared = nnx.data(make(1, hidden * num_shared) if num_shared else None)
        # So that a router that does not fit is refused now.
        jax.eval_shape(self.route, jax.ShapeDtypeStruct((1, dim), jnp.float32))

    def route(self, x: jax.Array, *, check_values: bool = False) -> Routing:
        """The router's choice for tokens [..., d], in float32.

        Args:
          x: [..., d].
          check_values: inside jit, refuse logits that are not finite, see
            `softmax_top_k`.

        Returns:
          A `Routing`.
        """
        logits = jnp.matmul(
            x.astype(jnp.float32),
            self.router[...].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        options = {
            "normalize": self.normalize,
            "scaling": self.scaling,
            "check_values": check_values,
        }
        if self.bias is None:
            return softmax_top_k(logits, self.k, **options)
        return sigmoid_group_top_k(
            logits,
            self.k,
            bias=self.bias[...],
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            **options,
        )

    def __call__(
        self,
        x: jax.Array,
        tables: ExpertTables | None = None,
        *,
        physical: ExpertWeights | None = None,
        is_padding: jax.Array | None = None,
        check_values: bool = False,
    ) -> tuple[jax.Array, MoEStats]:
        """Runs the layer.

        Args:
          x: [..., d]; with a sequence axis before d if the balance loss is used.
          tables: of this layer; None: slot i is expert i. New tables of the same shapes
            compile nothing anew.
          physical: weights of this device's slots, from `physical_weights`, where they
            are kept from step to step (serving); None: gathered here (training).
          is_padding: [...] bool, tokens to leave out: whatever they hold, even NaN, it
            reaches no output, gradient or count; their own output is zero.
          check_values: see `route`.

        Returns:
          outputs: like `x`.
          stats: a `MoEStats`.

        Raises:
          ValueError: for tables or weights that do not fit the layer.
        """
        if tables is not None and tables.num_experts != self.num_experts:
            raise ValueError(
                f"tables are for {tables.num_experts} experts, but the layer has "
                f"{self.num_experts}; make them from this model's placement."
            )
        if physical is not None and tables is None:
            raise ValueError(
                "physical weights need the tables that say whose they are."
            )
        if is_padding is not None:
            x = jnp.where(is_padding[..., None], jnp.zeros((), x.dtype), x)
        routing = self.route(x, check_values=check_values)
        experts = routing.experts
        if is_padding is not None:
            experts = jnp.where(is_padding[..., None], -1, experts)
        dtype = self.dtype or x.dtype
        tokens = x.reshape(-1, x.shape[-1]).astype(dtype)
        mine = ExpertWeights(*(leaf[...] for leaf in self.experts))
        outputs, slot_counts, overflow = mix_experts(
            tokens,
            experts.reshape(-1, self.k),
            routing.weights.reshape(-1, self.k),
            mine if physical is None else physical,
            tables,
            self.parallel,
            is_physical=physical is not None,
            implementation=self.implementation,
        )
        if self.shared is not None:
            gate, up, down = (leaf[0].astype(dtype) for leaf in self.shared)
            outputs += (jax.nn.silu(tokens @ gate) * (tokens @ up)) @ down
        counts = count_experts(experts, self.num_experts)
        if self.parallel.axis_name is not None:
            counts = lax.psum(counts, self.parallel.axis_name)
        loss = sequence_balance_loss(routing.scores, self.k, is_padding).mean()
        stats = MoEStats(counts, slot_counts, overflow, loss)
        return outputs.reshape(x.shape).astype(x.dtype), stats


def _check_fit(
    weights: ExpertWeights,
    tables: ExpertTables,
    parallel: ExpertParallel,
    is_physical: bool,
) -> None:
    if not is_physical:
        return  # physical_weights says it
    held = weights.gate.shape[0]
    if held * parallel.num_devices != tables.num_slots:
        raise ValueError(
            f"physical weights of {held} slots a device do not fit tables of "
            f"{tables.num_slots} slots on {parallel.num_devices} devices; gather them "
            "anew with physical_weights."
        )
