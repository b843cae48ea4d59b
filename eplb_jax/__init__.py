"""EPLB for JAX: expert load balancing inside the jitted program.

The names that need Flax are loaded when first used, so that planning placements does
not import it.
"""

import importlib
from typing import TYPE_CHECKING

from eplb_jax.migration import migrate
from eplb_jax.physical import physical_weights
from eplb_jax.placement import rebalance_experts
from eplb_jax.quality import balancedness, balancedness_bound
from eplb_jax.refine import refine_placement
from eplb_jax.tables import ExpertTables

if TYPE_CHECKING:
    from eplb_jax.moe import ExpertParallel, ExpertWeights, MoE, mix_experts

__all__ = [
    "ExpertParallel",
    "ExpertTables",
    "ExpertWeights",
    "MoE",
    "balancedness",
    "balancedness_bound",
    "migrate",
    "mix_experts",
    "physical_weights",
    "rebalance_experts",
    "refine_placement",
]

_OF_MOE = ("ExpertParallel", "ExpertWeights", "MoE", "mix_experts")


def __getattr__(name: str):
    if name not in _OF_MOE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("eplb_jax.moe"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
