"""EPLB for JAX: expert load balancing inside the jitted program."""

from eplb_jax.placement import rebalance_experts
from eplb_jax.quality import balancedness, balancedness_bound
from eplb_jax.refine import refine_placement

__all__ = [
    "balancedness",
    "balancedness_bound",
    "rebalance_experts",
    "refine_placement",
]
