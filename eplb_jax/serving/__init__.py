"""Rebalancing inside a server's jitted step: observe, plan, agree, migrate, switch.

Imports: placement, layer, runtime.
"""

from eplb_jax.serving.balancer import ExpertBalancer
from eplb_jax.serving.migration import count_migrated, migrate
from eplb_jax.serving.state import BalancerState

__all__ = [
    "BalancerState",
    "ExpertBalancer",
    "count_migrated",
    "migrate",
]
