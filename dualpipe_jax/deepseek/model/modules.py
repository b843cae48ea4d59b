"""The Flax modules of a model over the stages of one layout, and their parameters.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.layers import (
    Head,
    Layer,
    MultiTokenPrediction,
    initial_layer,
)
from dualpipe_jax.deepseek.model.layout import DENSE, MOE, NONE, Layout
from dualpipe_jax.deepseek.model.preparation import Balancing
from dualpipe_jax.deepseek.model.trees import (
    bias_state,
    map_with_names,
    parameters,
    spec_of,
    zero_where,
)
from dualpipe_jax.executor import PipelineParams
from eplb_jax import ExpertParallel
from eplb_jax.layer import Products

P = PartitionSpec
PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Modules:
    """Makes initial parameters, and modules from parameters.

    Parameters: `stages` is a list with, for each layer position, a dict of the parts of
    a layer, leaves [stages, ...]; `embed` is [vocabulary, D]; `head` is a dict of the
    last norm, the output matrix unless it is tied, and the multi-token prediction
    module.

    Attributes:
      arch: the sizes.
      layout: which layer is at which position.
      parallel: how the physical experts of a layer are divided over ep.
      products: of the layers' matrices.
    """

    arch: DeepSeekConfig
    layout: Layout
    parallel: ExpertParallel
    products: Products = "plain"

    def init(self, key: jax.Array) -> PipelineParams:
        """Returns initial parameters; each layer has its own key in any layout."""
        layers_key, embed_key, head_key, mtp_key = jax.random.split(key, 4)

        def one(position: int, layer: jax.Array) -> PyTree:
            layer_key = jax.random.fold_in(layers_key, layer)
            return initial_layer(
                self.arch, self.parallel, layer_key, **self._kinds(position)
            )

        stages = []
        for position in range(self.layout.num_layer_positions):
            layer_G = jnp.asarray(self.layout.layer_GP[:, position])
            tree = jax.vmap(functools.partial(one, position))(jnp.maximum(layer_G, 0))
            has = {DENSE: "dense", MOE: "moe"}
            kind_G = self.layout.kind_GP[:, position]
            for kind, name in has.items():
                if name in tree:
                    tree[name] = zero_where(kind_G != kind, tree[name])
            rest = {k: v for k, v in tree.items() if k not in has.values()}
            stages.append(tree | zero_where(kind_G == NONE, rest))
        head = parameters(Head(self.arch, head_key))
        if self.arch.num_nextn_predict_layers:
            head["mtp"] = parameters(self._mtp(mtp_key))
        shape = (self.arch.vocab_size, self.arch.hidden_size)
        initial = nnx.initializers.truncated_normal(stddev=self.arch.initializer_range)
        return PipelineParams(stages, initial(embed_key, shape), head)

    @functools.cached_property
    def param_specs(self) -> PipelineParams:
        """How parameters are divided over the axes other than the pipeline's."""
        shape = jax.eval_shape(lambda: self.init(_any_key()))
        # A stage's leaves have a leading axis of stages, which specs leave out.
        stages = map_with_names(lambda names, leaf: spec_of(names), shape.stages)
        head = map_with_names(lambda names, leaf: spec_of(names), shape.head)
        return PipelineParams(stages, P(None, "ep"), head)

    def layer(
        self, position: int, params: PyTree, balancing: Balancing | None
    ) -> Layer:
        """Returns the layer at a position, with the parameters of one stage."""
        bias = self._bias(balancing)
        state = [params] if bias is None else [params, bias]
        return nnx.merge(self._graphs[str(position)], *state)

    def head(self, params: PyTree) -> Head:
        """Returns the head, without the multi-token prediction module."""
        own = {name: leaf for name, leaf in params.items() if name != "mtp"}
        return nnx.merge(self._graphs["head"], own)

    def mtp(self, params: PyTree, balancing: Balancing) -> MultiTokenPrediction:
        """Returns the multi-token prediction module."""
        bias = self._bias(balancing)
        state = [params] if bias is None else [params, {"layer": bias}]
        return nnx.merge(self._graphs["mtp"], *state)

    def _bias(self, balancing: Balancing | None) -> PyTree | None:
        """The state of a layer's router beside its parameters, if there is any."""
        if balancing is None or not self.arch.has_router_bias:
            return None
        return bias_state(balancing.bias)

    @functools.cached_property
    def _graphs(self) -> dict[str, Any]:
        """The structure of the modules, without their arrays."""
        makers: dict[str, Any] = {
            str(position): functools.partial(self._layer, position)
            for position in range(self.layout.num_layer_positions)
        }
        makers["head"] = functools.partial(Head, self.arch)
        if self.arch.num_nextn_predict_layers:
            makers["mtp"] = self._mtp
        return {
            name: nnx.graphdef(nnx.eval_shape(lambda make=make: make(_any_key())))
            for name, make in makers.items()
        }

    def _kinds(self, position: int) -> dict[str, bool]:
        kinds = self.layout.kinds(position)
        return {"has_dense": DENSE in kinds, "has_moe": MOE in kinds}

    def _layer(self, position: int, key: jax.Array) -> Layer:
        return Layer(
            self.arch,
            self.parallel,
            products=self.products,
            key=key,
            **self._kinds(position),
        )

    def _mtp(self, key: jax.Array) -> MultiTokenPrediction:
        return MultiTokenPrediction(self.arch, self.parallel, key, self.products)


def _any_key() -> jax.Array:
    """Returns a key for structures, whose arrays are never computed."""
    return jax.random.key(0)
