"""The weights of a layer's experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class ExpertWeights(NamedTuple):
    """SwiGLU experts: `down(silu(gate(x)) * up(x))`, without biases.

    For products in float8, weights that need no gradient may be `ScaledWeight`s of
    `eplb_jax.products`.

    Attributes:
      gate: [experts, d, hidden].
      up: [experts, d, hidden].
      down: [experts, hidden, d].
    """

    gate: Any
    up: Any
    down: Any

    @property
    def num_experts(self) -> int:
        """Experts that these are the weights of."""
        return jax.tree.leaves(self.gate)[0].shape[0]
