"""EPLB for JAX: expert load balancing inside the jitted program.

`MoE`, which needs Flax, is loaded when first used, so that planning does not import it.
"""

from typing import TYPE_CHECKING

from eplb_jax.balancer import BalancerState, ExpertBalancer
from eplb_jax.migration import migrate
from eplb_jax.mixture import ExpertParallel, ExpertWeights, mix_experts
from eplb_jax.physical import physical_weights
from eplb_jax.placement import rebalance_experts
from eplb_jax.quality import balancedness, balancedness_bound
from eplb_jax.refine import refine_placement
from eplb_jax.tables import ExpertTables

if TYPE_CHECKING:
    from eplb_jax.moe import MoE

__all__ = [
    "BalancerState",
    "ExpertBalancer",
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


def __getattr__(name: str):
    if name != "MoE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from eplb_jax.moe import MoE

    globals()[name] = MoE
    return MoE


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
