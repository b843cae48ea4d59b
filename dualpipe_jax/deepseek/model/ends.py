"""The two ends of the model: the embedding before the stages, the loss after them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from dualpipe_jax.deepseek.model.devices import gather_matrix, kernels_for, look_up
from dualpipe_jax.deepseek.model.losses import cross_entropies, cross_entropy, logits_of
from dualpipe_jax.deepseek.model.modules import Modules
from dualpipe_jax.deepseek.model.observation import Stats, stats_of
from dualpipe_jax.deepseek.model.options import DeepSeekOptions
from dualpipe_jax.deepseek.model.preparation import Balancing

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class ModelEnds:
    """Embeds tokens, and computes losses and logits from the last stage's output.

    Methods take prepared parameters (see `ParamPreparation`).

    Attributes:
      modules: of the model.
      options: how it is trained.
      mesh: with the axis ep.
    """

    modules: Modules
    options: DeepSeekOptions
    mesh: Mesh | AbstractMesh

    def embed(self, embed: jax.Array, tokens: jax.Array) -> jax.Array:
        """Returns embeddings [batch, sequence, D]."""
        return look_up(embed, tokens, self.mesh)

    def loss(
        self,
        embed: jax.Array | None,
        head: PyTree,
        x: jax.Array,
        targets: jax.Array,
        weights: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Returns the training loss, and its terms."""
        kernel = self._output_matrix(embed, head)
        sets, stats = [(self._norm(head, x), targets, weights)], None
        if self.modules.arch.num_nextn_predict_layers:
            assert embed is not None
            hidden, stats = self._predict_further(embed, head, x, targets)
            # The token after the next is the target of the next position; a sequence's
            # last position has none.
            further = None if weights is None else weights[:, 1:]
            sets.append((hidden[:, :-1], targets[:, 1:], further))
        (loss, z_loss), *more = cross_entropies(sets, kernel)
        aux = {"loss": loss, "z_loss": z_loss}
        total = loss + self.options.z_loss * z_loss
        if stats is not None:
            ((mtp, _),) = more
            total = total + self.options.mtp_weight * mtp
            total = total + self.options.balance_loss * stats["balance_loss"]
            aux |= {"mtp_loss": mtp, "mtp": stats}
        return total, aux

    def evaluate(
        self,
        embed: jax.Array | None,
        head: PyTree,
        x: jax.Array,
        targets: jax.Array,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the mean cross-entropy of the next tokens alone."""
        kernel = self._output_matrix(embed, head)
        return cross_entropy(self._norm(head, x), kernel, targets, weights)[0]

    def logits(self, embed: jax.Array | None, head: PyTree, x: jax.Array) -> jax.Array:
        """Returns [batch, sequence, vocabulary] float32."""
        kernel = self._output_matrix(embed, head)
        return logits_of(self._norm(head, x), kernel)

    def _predict_further(
        self, embed: jax.Array, head: PyTree, x: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, Stats]:
        """Runs multi-token prediction; returns activations and statistics."""
        balancing: Balancing = head["balancing"]
        module = self.modules.mtp(head["params"]["mtp"], balancing)
        with kernels_for(self.mesh):
            hidden, stats = module(x, self.embed(embed, targets), balancing.tables)
        return hidden, stats_of(stats, self.modules.parallel)

    def _norm(self, head: PyTree, x: jax.Array) -> jax.Array:
        return self.modules.head(head["params"]).norm(x)

    def _output_matrix(self, embed: jax.Array | None, head: PyTree) -> jax.Array:
        if self.modules.arch.tie_word_embeddings:
            assert embed is not None
            return gather_matrix(embed, axis=1, mesh=self.mesh).T
        return head["params"]["kernel"]
