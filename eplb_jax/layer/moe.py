"""The mixture of experts as a Flax NNX module: router, routed and shared experts."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from eplb_jax.layer.expert_weights import ExpertWeights
from eplb_jax.layer.experts import Products, run_network
from eplb_jax.layer.mixture import mix
from eplb_jax.layer.parallel import ONE_DEVICE, ExpertParallel
from eplb_jax.layer.routing import (
    Routing,
    sequence_balance_loss,
    sigmoid_group_top_k,
    softmax_top_k,
)
from eplb_jax.placement import ExpertTables, check_choices
from eplb_jax.products import Implementation, ScaledRows, scale_rows


class RouterBias(nnx.Variable):
    """The bias that affects only the selection of experts; see `update_bias`.

    It is not a parameter: it has no gradient, and the training step replaces it.
    """


class MoEStats(NamedTuple):
    """Statistics of a layer's call, the same on all devices of the expert axis.

    Attributes:
      tokens_per_expert: [experts] int32, tokens that chose each expert; input of load
        estimators and of `update_bias`.
      tokens_per_physical_expert: [physical experts] int32, tokens that were assigned to
        each physical expert. With exact balance a row that a fetched expert computes
        counts where its weights were fetched from: these are the loads as they would
        be without it.
      overflow: [] int32, choices that did not fit into a buffer; they count as zero.
      balance_loss: [] float32, `sequence_balance_loss`, mean over this device's
        sequences (so it may differ between devices); 1 is even.
      device_rows: [devices] int32, rows that each device computes.
      num_fetched: [] int32, experts that all devices fetch, with exact balance; else 0.
      num_moved: [] int32, with exact balance, choices that are computed on another
        device than their token's; else 0.
    """

    tokens_per_expert: jax.Array
    tokens_per_physical_expert: jax.Array
    overflow: jax.Array
    balance_loss: jax.Array
    device_rows: jax.Array
    num_fetched: jax.Array
    num_moved: jax.Array


class MoE(nnx.Module):
    """Router, routed experts and shared experts.

    Parameters are logical: one copy of each expert, whatever the placement is. On a
    mesh the module runs inside `jax.shard_map`, with the leaves of `experts` divided
    along their first axis and everything else replicated. Differentiating the mapped
    function sums the gradients of replicated parameters over devices; callers that
    differentiate inside it must sum these themselves.

    Attributes:
      router: [d, experts] float32 parameter.
      bias: [experts] `RouterBias`, for the sigmoid router; else None.
      experts: `ExpertWeights` of parameters; a server that passes `physical` may set
        it to None.
      shared: `ExpertWeights` of parameters, one wide expert; or None.

    Examples:
      Eight experts as ten physical experts; experts 0 and 1 have two replicas:

      >>> layer = MoE(16, 32, num_experts=8, top_k=2, rngs=nnx.Rngs(0))
      >>> placement = jnp.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1])
      >>> tables = ExpertTables.from_placement(placement, 8)
      >>> step = nnx.jit(lambda layer, x, tables: layer(x, tables))
      >>> y, stats = step(layer, jnp.ones((3, 5, 16)), tables)
      >>> y.shape, int(stats.tokens_per_expert.sum())
      ((3, 5, 16), 30)
      >>> stats.tokens_per_physical_expert.shape
      (10,)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        num_experts: int,
        top_k: int,
        num_shared: int = 0,
        router: Literal["sigmoid", "softmax"] = "sigmoid",
        num_groups: int = 1,
        topk_groups: int = 1,
        route_norm: bool = True,
        route_scale: float = 1.0,
        parallel: ExpertParallel = ONE_DEVICE,
        implementation: Implementation = "auto",
        products: Products = "plain",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initializes the parameters.

        Args:
          dim: features of a token, d.
          hidden: features inside an expert.
          num_experts: routed experts.
          top_k: routed experts per token.
          num_shared: experts that every token goes to, with weight 1.
          router: `"sigmoid"` is DeepSeek-V3's, see `sigmoid_group_top_k`; `"softmax"`
            is DeepSeek-V2's and others', see `softmax_top_k`.
          num_groups: groups of experts.
          topk_groups: groups that a token may use.
          route_norm: whether a token's router weights are normalized to sum to 1,
            before `route_scale`.
          route_scale: factor of the router weights.
          parallel: how the physical experts are divided among devices.
          implementation: see `grouped_matmul`.
          products: `"fp8"` quantizes the operands of the experts' products, forward and
            backward, to float8_e4m3fn, with scales for 1 x 128 values of activations
            and gradients and for 128 x 128 of weights (arXiv:2412.19437, section 3.3);
            what is kept for the backward pass is in float8, too. With a payload in
            float8 the experts multiply what was sent. `"plain"`: in `dtype`.
          dtype: of the experts' arithmetic; None: that of the input.
          param_dtype: of the experts' parameters. The router's are float32.
          rngs: provides the key stream `params`.

        Raises:
          ValueError: for sizes that do not fit each other.
        """
        if router not in ("sigmoid", "softmax"):
            raise ValueError(f"{router=} must be 'sigmoid' or 'softmax'.")
        if num_experts % parallel.num_devices:
            raise ValueError(
                f"parallel.num_devices={parallel.num_devices} must divide "
                f"{num_experts=}."
            )
        if parallel.spread_shared and num_shared != 1:
            raise ValueError(
                f"parallel.spread_shared=True needs a shared expert of the size of the "
                f"others, but {num_shared=}; use num_shared=1, or leave it out."
            )
        self.num_experts, self.top_k, self.kind = num_experts, top_k, router
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.route_norm, self.route_scale = route_norm, route_scale
        self.parallel = parallel
        self.implementation: Implementation = implementation
        check_choices(products=(products, Products))
        self.products: Products = products
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
        # Raises now if the router's sizes do not fit each other.
        jax.eval_shape(self.route, jax.ShapeDtypeStruct((1, dim), jnp.float32))

    def route(self, x: jax.Array, *, check_values: bool = False) -> Routing:
        """Routes tokens, in float32.

        Args:
          x: [..., d].
          check_values: inside jit, reject logits that are not finite, see
            `softmax_top_k`.

        Returns:
          A `Routing`.
        """
        logits = jnp.matmul(
            x.astype(jnp.float32),
            self.router[...].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        options: dict[str, Any] = {
            "num_groups": self.num_groups,
            "topk_groups": self.topk_groups,
            "route_norm": self.route_norm,
            "route_scale": self.route_scale,
            "check_values": check_values,
        }
        if self.bias is None:
            return softmax_top_k(logits, self.top_k, **options)
        return sigmoid_group_top_k(logits, self.top_k, bias=self.bias[...], **options)

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
          tables: of this layer; None: physical expert i is expert i. New tables of the
            same shapes do not recompile anything.
          physical: weights of this device's physical experts, from `physical_weights`,
            if they are kept between steps (serving); None: gathered here (training).
          is_padding: [...] bool, tokens to leave out: their values, even NaN, reach no
            output, gradient or count; their own output is zero.
          check_values: see `route`.

        Returns:
          outputs: of the shape and dtype of `x`.
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
                "physical weights need the tables by which they were gathered; pass "
                "tables."
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
        rows: jax.Array | ScaledRows = tokens
        if self.products == "fp8" and self.parallel.payload == "fp8":
            rows = scale_rows(tokens)  # once, for the shared experts too
        shared = self.shared
        if shared is not None:
            shared = ExpertWeights(*(leaf.get_value() for leaf in shared))
        is_planned = self.parallel.is_exact and self.parallel.spread_shared
        mixed = mix(
            rows,
            experts.reshape(-1, self.top_k),
            routing.weights.reshape(-1, self.top_k),
            held,
            tables,
            self.parallel,
            is_physical=physical is not None,
            implementation=self.implementation,
            products=self.products,
            is_distinct=True,
            shared=shared if is_planned else None,
        )
        outputs, counts = mixed.outputs, mixed.tokens_per_physical_expert
        if shared is not None and not is_planned:
            weights = jax.tree.map(lambda leaf: leaf[0], shared)
            outputs += run_network(rows, weights, products=self.products)
        if tables is not None:
            # Each choice has one physical expert, whose count is that of all devices.
            counts = tables.add_replicas(counts)
        losses = sequence_balance_loss(routing.scores, self.top_k, is_padding)
        # Their mean; 0 without sequences.
        loss = losses.sum() / max(1, losses.size)
        stats = MoEStats(
            tokens_per_expert=counts,
            tokens_per_physical_expert=mixed.tokens_per_physical_expert,
            overflow=mixed.overflow,
            balance_loss=loss,
            device_rows=mixed.device_rows,
            num_fetched=mixed.num_fetched,
            num_moved=mixed.num_moved,
        )
        return outputs.reshape(x.shape).astype(x.dtype), stats
