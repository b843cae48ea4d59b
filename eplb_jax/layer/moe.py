"""A mixture of experts as a Flax NNX module: router, routed and shared experts."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from eplb_jax.layer.grouped_products import Implementation
from eplb_jax.layer.mixture import (
    ONE_DEVICE,
    ExpertParallel,
    ExpertWeights,
    mix_experts,
)
from eplb_jax.layer.routing import (
    Routing,
    sequence_balance_loss,
    sigmoid_group_top_k,
    softmax_top_k,
)
from eplb_jax.placement import ExpertTables


class RouterBias(nnx.Variable):
    """What only the choice of experts sees; changed by `update_bias`, not by AD."""


class MoEStats(NamedTuple):
    """What a layer has to tell, the same on all devices of the expert axis.

    Attributes:
      tokens_per_expert: [experts] int32, tokens that chose each expert: what the load
        estimators of `eplb_jax.placement.load` take.
      tokens_per_physical_expert: [slots] int32, tokens that each slot was to compute.
      overflow: [] int32, choices that found no room in a buffer and count as zero.
      balance_loss: [] float32, `sequence_balance_loss`, mean over this device's
        sequences; 1 is even.
    """

    tokens_per_expert: jax.Array
    tokens_per_physical_expert: jax.Array
    overflow: jax.Array
    balance_loss: jax.Array


class MoE(nnx.Module):
    """Router, routed experts and shared experts.

    Parameters are logical: one copy of each expert, whatever the placement. On a mesh
    the module runs inside `jax.shard_map`, with the leaves of `experts` divided along
    their first axis and everything else replicated. Differentiating the mapped function
    adds up the gradients of what is replicated; who differentiates inside it has to.

    Attributes:
      router: [d, experts] float32 parameter.
      bias: [experts] `RouterBias`, for the sigmoid router; else None.
      experts: `ExpertWeights` of parameters; a server that passes `physical` may set
        it to None.
      shared: `ExpertWeights` of parameters, one wide expert; or None.

    Examples:
      Eight experts in ten slots, two of them for second replicas:

      >>> layer = MoE(16, 32, num_experts=8, k=2, rngs=nnx.Rngs(0))
      >>> slots = jnp.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1])
      >>> tables = ExpertTables.from_placement(slots, 8)
      >>> step = nnx.jit(lambda layer, x, tables: layer(x, tables))
      >>> y, stats = step(layer, jnp.ones((3, 5, 16)), tables)
      >>> y.shape, stats.tokens_per_physical_expert.shape, int(stats.tokens_per_expert.sum())
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
        parallel: ExpertParallel = ONE_DEVICE,
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

        self.experts: Any = nnx.data(make(num_experts, hidden))
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
        held = physical
        if held is None:
            held = ExpertWeights(*(leaf[...] for leaf in self.experts))
        outputs, tokens_per_physical_expert, overflow = mix_experts(
            tokens,
            experts.reshape(-1, self.k),
            routing.weights.reshape(-1, self.k),
            held,
            tables,
            self.parallel,
            is_physical=physical is not None,
            implementation=self.implementation,
        )
        if self.shared is not None:
            gate, up, down = (leaf[0].astype(dtype) for leaf in self.shared)
            outputs += (jax.nn.silu(tokens @ gate) * (tokens @ up)) @ down
        counts = tokens_per_physical_expert
        if tables is not None:
            # Each choice has one slot, and all devices know the slots' counts.
            counts = tables.add_replicas(tokens_per_physical_expert)
        loss = sequence_balance_loss(routing.scores, self.k, is_padding).mean()
        stats = MoEStats(counts, tokens_per_physical_expert, overflow, loss)
        return outputs.reshape(x.shape).astype(x.dtype), stats
