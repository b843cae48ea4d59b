"""For sglang-jax: a planner with its signature, and its arrays from our tables.

The engine itself is not imported; see docs/sglang_jax.md.

Imports: placement.
"""

from eplb_jax.sglang_jax.metadata import (
    ExpertLocationArrays,
    expert_location_arrays,
    update_metadata,
)
from eplb_jax.sglang_jax.planner import rebalance_experts

__all__ = [
    "ExpertLocationArrays",
    "expert_location_arrays",
    "rebalance_experts",
    "update_metadata",
]
