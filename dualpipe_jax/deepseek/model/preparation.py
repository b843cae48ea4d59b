"""From the parameters that are trained to those that the pipeline runs with, and back.

This runs once per step, for all of its microbatches.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dualpipe_jax.deepseek.model.balancing import RouterState, TrainingBalancer
from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.layout import MOE, Layout
from dualpipe_jax.deepseek.model.physical_experts import (
    gather_physical_experts,
    sum_replica_grads,
)
from dualpipe_jax.deepseek.model.trees import map_with_names
from dualpipe_jax.executor import PipelineParams
from eplb_jax import ExpertTables

P = PartitionSpec
PyTree = Any


class Balancing(NamedTuple):
    """What an MoE layer needs besides its parameters.

    Attributes:
      bias: [experts] float32, see `eplb_jax.layer.moe.RouterBias`.
      tables: of this layer, if the experts' weights are those of the device's physical
        experts; None: physical expert i is expert i.
    """

    bias: Any
    tables: ExpertTables | None


@dataclasses.dataclass(frozen=True)
class ParamPreparation:
    """Casts parameters, gathers physical experts, and adds what is not a parameter.

    In the prepared parameters, `stages` is a dict: `layers`, like the parameters'
    `stages`; `kind`, [stages, layer positions] of the layout; and `balancing`, for each
    layer position with experts (its number, as text) the `Balancing` of each stage.
    `head` is a dict: `params`, like the parameters' `head`, and the `balancing` of the
    multi-token prediction module.

    Attributes:
      arch: the sizes.
      layout: which layer is at which position.
      balancer: makes the tables.
      mesh: with the axes pp and ep.
      compute_dtype: of all weights except the routers'.
    """

    arch: DeepSeekConfig
    layout: Layout
    balancer: TrainingBalancer
    mesh: Mesh | AbstractMesh
    compute_dtype: str

    def prepare_params(
        self, params: PipelineParams, state: RouterState
    ) -> PipelineParams:
        """Returns the parameters that the pipeline runs with; see the class."""
        params = map_with_names(self._cast, params)
        tables = self.balancer.tables(state)
        params = self._for_experts(gather_physical_experts, params, tables)
        every = Balancing(state.bias, tables)
        last = None
        if self.arch.num_nextn_predict_layers:
            last = jax.tree.map(lambda leaf: leaf[-1], every)
        stages = {
            "layers": params.stages,
            "kind": jnp.asarray(self.layout.kind_GP),
            "balancing": {
                str(position): self._at_position(every, position)
                for position in self.layout.positions_of(MOE)
            },
        }
        head = {"params": params.head, "balancing": last}
        return PipelineParams(stages, params.embed, head)

    def unprepare_grads(
        self, grads: PipelineParams, state: RouterState
    ) -> PipelineParams:
        """Returns gradients of the parameters, from those of the prepared ones."""
        grads = PipelineParams(
            grads.stages["layers"], grads.embed, grads.head["params"]
        )
        tables = self.balancer.tables(state)
        return self._for_experts(sum_replica_grads, grads, tables)

    def specs(self, specs: PipelineParams) -> PipelineParams:
        """Returns how prepared parameters are sharded, from the parameters' specs."""
        stages = {"layers": specs.stages, "kind": P(), "balancing": P()}
        # The output matrix is gathered once for all microbatches of a step: gathering
        # it for each of them would take longer than the product with it.
        params = {
            name: P() if name == "kernel" else each for name, each in specs.head.items()
        }
        head = {"params": params, "balancing": P()}
        return PipelineParams(stages, specs.embed, head)

    def _cast(self, names: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        return leaf if "router" in names else leaf.astype(self.compute_dtype)

    def _at_position(self, tree: PyTree, position: int) -> PyTree:
        """Selects values of MoE layers for the stages' layers at a position."""
        first = self.arch.first_k_dense_replace
        return jax.tree.map(
            lambda leaf: self.layout.to_position(leaf, position, first), tree
        )

    def _for_experts(
        self, function, tree: PipelineParams, tables: ExpertTables | None
    ) -> PipelineParams:
        """Applies a function of `physical_experts.py` to all experts."""
        if tables is None:
            return tree
        layers, head = list(tree.stages), tree.head
        for position in self.layout.positions_of(MOE):
            own = self._at_position(tables, position)
            moe = layers[position]["moe"]
            experts = function(moe["experts"], own, self.mesh, "pp")
            layers[position] = layers[position] | {"moe": moe | {"experts": experts}}
        if self.arch.num_nextn_predict_layers:
            layer = head["mtp"]["layer"]
            one = jax.tree.map(lambda leaf: leaf[None], layer["moe"]["experts"])
            last = jax.tree.map(lambda leaf: leaf[-1:], tables)
            experts = function(one, last, self.mesh, None)
            experts = jax.tree.map(lambda leaf: leaf[0], experts)
            layer = layer | {"moe": layer["moe"] | {"experts": experts}}
            head = head | {"mtp": head["mtp"] | {"layer": layer}}
        return PipelineParams(layers, tree.embed, head)
