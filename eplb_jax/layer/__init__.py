"""The mixture-of-experts layer: routing, dispatch to replicas, experts.

Imports: placement, products, runtime.
"""

from typing import TYPE_CHECKING

from eplb_jax import lookup
from eplb_jax.layer.exchange import Transport as Transport
from eplb_jax.layer.expert_weights import ExpertWeights
from eplb_jax.layer.experts import Products as Products, run_network as run_network
from eplb_jax.layer.microbatch_plan import MicrobatchPlan, plan_microbatch
from eplb_jax.layer.mixture import (
    EXCHANGED as EXCHANGED,
    mix_experts,
)
from eplb_jax.layer.parallel import (
    ONE_DEVICE as ONE_DEVICE,
    Balance as Balance,
    ExpertParallel,
    Route as Route,
)
from eplb_jax.layer.payload import (
    Payload as Payload,
    bytes_of_token as bytes_of_token,
    check_payload as check_payload,
)
from eplb_jax.layer.physical import (
    check_held as check_held,
    count_gathered_experts as count_gathered_experts,
    gather_weight_rows as gather_weight_rows,
    physical_weights,
    plan_weight_gather as plan_weight_gather,
)
from eplb_jax.layer.routing import (
    Routing,
    sequence_balance_loss,
    sigmoid_group_top_k,
    softmax_top_k,
    update_bias,
)

if TYPE_CHECKING:
    from eplb_jax.layer.moe import MoE, MoEStats as MoEStats

__all__ = [
    "ExpertParallel",
    "ExpertWeights",
    "MicrobatchPlan",
    "MoE",
    "Routing",
    "mix_experts",
    "physical_weights",
    "plan_microbatch",
    "sequence_balance_loss",
    "sigmoid_group_top_k",
    "softmax_top_k",
    "update_bias",
]

__getattr__, __dir__ = lookup.attach(
    __name__,
    {
        "MoE": "eplb_jax.layer.moe",
        "MoEStats": "eplb_jax.layer.moe",
    },
)
