"""The weights of a layer's experts."""

from __future__ import annotations

from typing import Any, NamedTuple


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
