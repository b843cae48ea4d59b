"""Rebalancing inside a server's jitted step: observe, plan, migrate.

Imports: placement, layer.
"""

from eplb_jax.serving.balancer import BalancerState, ExpertBalancer
from eplb_jax.serving.migration import count_migrated, migrate

__all__ = [
    "BalancerState",
    "ExpertBalancer",
    "count_migrated",
    "migrate",
]
