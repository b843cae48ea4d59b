"""What a stage runs: its layers, each at its position.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from dualpipe_jax.deepseek.model.devices import gather_matrix, kernels_for
from dualpipe_jax.deepseek.model.layers import Layer
from dualpipe_jax.deepseek.model.layout import DENSE, MOE, NONE
from dualpipe_jax.deepseek.model.losses import add_loss
from dualpipe_jax.deepseek.model.modules import Modules
from dualpipe_jax.deepseek.model.observation import no_stats, stats_of
from dualpipe_jax.deepseek.model.options import DeepSeekOptions
from dualpipe_jax.deepseek.model.preparation import Balancing
from eplb_jax.layer import EXCHANGED

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class StageRunner:
    """Runs the layers of a stage on its prepared parameters (see `ParamPreparation`).

    Attributes:
      modules: of the model.
      options: how it is trained.
      num_microbatches: of a step.
      mesh: with the axis ep.
    """

    modules: Modules
    options: DeepSeekOptions
    num_microbatches: int
    mesh: Mesh | AbstractMesh

    def run(
        self, kinds: tuple[int, ...] | None, params: PyTree, x: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        """Runs a stage.

        Args:
          kinds: kind of layer at each position; None: any stage, whose parameters say
            which kinds it has.
          params: prepared parameters of the stage.
          x: [batch, sequence, D].

        Returns:
          outputs: like `x`.
          stats: by layer position (its number, as text), for positions with experts.
        """
        aux, layout = {}, self.modules.layout
        with kernels_for(self.mesh):
            for position in range(layout.num_layer_positions):
                found = layout.kinds(position) if kinds is None else {kinds[position]}
                x, stats = self._run_layer(position, found, params, x)
                if stats is not None:
                    aux[str(position)] = stats
        return x, aux

    def _run_layer(
        self, position: int, kinds: Set[int], params: PyTree, x: jax.Array
    ) -> Any:
        """Runs the layer at a position, which is of one of `kinds`."""
        kind = params["kind"][position]
        tree = params["layers"][position]
        balancing: Balancing | None = params["balancing"].get(str(position))
        nothing = None
        if balancing is not None:
            nothing = no_stats(self.modules.arch, self.modules.parallel)

        def attend(x: jax.Array):
            with jax.named_scope("attn"):
                return self.modules.layer(position, tree, balancing).attend(x)

        def dense(x: jax.Array):
            # Gathered here, so that stages with experts at this position do not gather.
            whole = tree | {"dense": self._gather_dense(tree["dense"])}
            layer = self.modules.layer(position, whole, balancing)
            return layer.feed_forward(x), nothing

        def mix(x: jax.Array):
            return self._mix(
                self.modules.layer(position, tree, balancing), x, balancing
            )

        remat = self.options.remat
        # Gathered matrices must not be kept until W: they are larger than all
        # activations.
        feed = {DENSE: jax.checkpoint(dense), MOE: mix}
        if "attention" in remat and "experts" not in remat:
            attend = jax.checkpoint(attend)

        def run(x: Any):
            x = attend(x)
            if len(kinds - {NONE}) == 1:
                (only,) = kinds - {NONE}
                return feed[only](x)
            return lax.cond(kind == DENSE, feed[DENSE], mix, x)

        if {"attention", "experts"} <= set(remat):
            # The experts' input is an output of the attention: one recomputation
            # serves both.
            keep = jax.checkpoint_policies.save_only_these_names(*EXCHANGED)
            run = jax.checkpoint(run, policy=keep)

        if NONE not in kinds:
            return run(x)
        if kinds == {NONE}:
            return x, nothing
        return lax.cond(kind != NONE, run, lambda x: (x, nothing), x)

    def _gather_dense(self, dense: PyTree) -> PyTree:
        axes = {"gate": 1, "up": 1, "down": 0}
        return {
            name: {"kernel": gather_matrix(dense[name]["kernel"], axis, self.mesh)}
            for name, axis in axes.items()
        }

    def _mix(self, layer: Layer, x: jax.Array, balancing: Balancing | None) -> Any:
        assert balancing is not None
        y, stats = layer.mix(x, balancing.tables)
        weight = self.options.balance_loss / self.num_microbatches
        return add_loss(y, stats.balance_loss, weight), stats_of(
            stats, self.modules.parallel
        )
