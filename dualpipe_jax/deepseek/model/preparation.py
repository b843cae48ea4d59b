"""From the parameters that are trained to those that the pipeline runs with, and back.

Done once a step, for all of its microbatches.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from dualpipe_jax.deepseek.model.balancing import (
    Balancer,
    RouterState,
    from_slots,
    to_slots,
)
from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.layout import MOE, Layout
from dualpipe_jax.deepseek.model.trees import map_with_names
from dualpipe_jax.executor import PipelineParams
from eplb_jax import ExpertTables

PyTree = Any


class Balancing(NamedTuple):
    """What an MoE layer is given beside its parameters.

    Attributes:
      bias: [experts] float32, see `eplb_jax.layer.moe.RouterBias`.
      tables: of this layer, where the experts' weights are those of the device's slots;
        None: slot i is expert i.
    """

    bias: Any
    tables: ExpertTables | None


@dataclasses.dataclass(frozen=True)
class ParamPreparation:
    """Casts parameters, gathers the slots' experts, and adds what is no parameter.

    What the pipeline gets: `stages` is a dict of `slots`, as the parameters' `stages`;
    `kind`, [stages, slots] of the layout; and `balancing`, for each slot with experts
    (by its number, as text) its stages' `Balancing`. `head` is a dict of `params`, as
    the parameters' `head`, and the `balancing` of the multi-token prediction module.

    Attributes:
      arch: the sizes.
      layout: which layer stands where.
      balancer: whose tables are used.
      mesh: with the axes pp and ep.
      compute_dtype: of all weights but the routers'.
    """

    arch: DeepSeekConfig
    layout: Layout
    balancer: Balancer
    mesh: Mesh | AbstractMesh
    compute_dtype: str

    def prepare_params(
        self, params: PipelineParams, buffers: RouterState
    ) -> PipelineParams:
        """See the class."""
        params = map_with_names(self._cast, params)
        tables = self.balancer.tables(buffers)
        params = self._for_experts(to_slots, params, tables)
        every = Balancing(buffers.bias, tables)
        last = None
        if self.arch.mtp:
            last = jax.tree.map(lambda leaf: leaf[-1], every)
        stages = {
            "slots": params.stages,
            "kind": jnp.asarray(self.layout.kind_GS),
            "balancing": {
                str(slot): self._of_slot(every, slot)
                for slot in self.layout.slots_of(MOE)
            },
        }
        head = {"params": params.head, "balancing": last}
        return PipelineParams(stages, params.embed, head)

    def unprepare_grads(
        self, grads: PipelineParams, buffers: RouterState
    ) -> PipelineParams:
        """Gradients of what `prepare_params` took; those of an expert's replicas are added."""
        grads = PipelineParams(grads.stages["slots"], grads.embed, grads.head["params"])
        return self._for_experts(from_slots, grads, self.balancer.tables(buffers))

    def _cast(self, names: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        return leaf if "router" in names else leaf.astype(self.compute_dtype)

    def _of_slot(self, tree: PyTree, slot: int) -> PyTree:
        """Values of MoE layers, for the layers that the stages have in a slot."""
        first = self.arch.first_k_dense_replace
        return jax.tree.map(lambda leaf: self.layout.to_slot(leaf, slot, first), tree)

    def _for_experts(
        self, function, tree: PipelineParams, tables: ExpertTables | None
    ) -> PipelineParams:
        """Applies `to_slots` or `from_slots` to all experts."""
        if tables is None:
            return tree
        slots, head = list(tree.stages), tree.head
        for slot in self.layout.slots_of(MOE):
            own = self._of_slot(tables, slot)
            moe = slots[slot]["moe"]
            experts = function(moe["experts"], own, self.mesh, "pp")
            slots[slot] = slots[slot] | {"moe": moe | {"experts": experts}}
        if self.arch.mtp:
            layer = head["mtp"]["layer"]
            one = jax.tree.map(lambda leaf: leaf[None], layer["moe"]["experts"])
            last = jax.tree.map(lambda leaf: leaf[-1:], tables)
            experts = function(one, last, self.mesh, None)
            experts = jax.tree.map(lambda leaf: leaf[0], experts)
            layer = layer | {"moe": layer["moe"] | {"experts": experts}}
            head = head | {"mtp": head["mtp"] | {"layer": layer}}
        return PipelineParams(slots, tree.embed, head)
