"""EPLB for JAX: expert load balancing inside the jitted program.

Every name is loaded when it is first used, so that importing this package imports
neither jax nor flax.

Shape suffixes: `loads_LE` has the shape [layers, experts], with these letters in every
file of the package. A file's docstring adds letters that only it uses; 1 is an axis of
size 1.

  A  rows that are processed alike: layers, or the nodes of all layers
  D  devices
  E  logical experts
  F  features of a token (model width)
  G  groups of experts
  H  hidden features of an expert
  I  physical experts of one device
  K  choices per token (top_k)
  L  layers
  M  rows of a buffer
  N  nodes
  R  replicas of an expert
  S  physical experts of all devices
  T  tokens
  W  windows of time: steps, or intervals of a recording
  X  entries of a row that is packed or permuted
"""

from typing import TYPE_CHECKING

from eplb_jax import lookup, plugins

if TYPE_CHECKING:
    from eplb_jax.files import (
        PlacementFile,
        Recording,
        read_loads,
        read_placement,
        write_placement,
    )
    from eplb_jax.layer import (
        ExpertParallel,
        ExpertWeights,
        MicrobatchPlan,
        MoE,
        MoEStats,
        Routing,
        mix_experts,
        physical_weights,
        plan_microbatch,
        sequence_balance_loss,
        sigmoid_group_top_k,
        softmax_top_k,
        update_bias,
    )
    from eplb_jax.pictures import (
        balancedness_figure,
        placement_figure,
        placement_text,
        replay_figure,
        replay_text,
    )
    from eplb_jax.placement import (
        ExpertTables,
        LoadEstimator,
        balancedness,
        balancedness_bound,
        moving_average,
        rebalance_experts,
        refine_placement,
        restore_state,
        save_state,
        sum_of_last,
    )
    from eplb_jax.products import (
        Scaled,
        grouped_matmul,
        quantize_blocks,
        quantize_tiles,
        scaled_grouped_matmul,
        scaled_matmul,
    )
    from eplb_jax.recordings import Outcome, replay
    from eplb_jax.serving import BalancerState, ExpertBalancer, count_migrated, migrate

__all__ = [
    "BalancerState",
    "ExpertBalancer",
    "ExpertParallel",
    "ExpertTables",
    "ExpertWeights",
    "LoadEstimator",
    "MicrobatchPlan",
    "MoE",
    "MoEStats",
    "Outcome",
    "PlacementFile",
    "Recording",
    "Routing",
    "Scaled",
    "balancedness",
    "balancedness_bound",
    "balancedness_figure",
    "count_migrated",
    "grouped_matmul",
    "migrate",
    "mix_experts",
    "moving_average",
    "physical_weights",
    "placement_figure",
    "placement_text",
    "plan_microbatch",
    "quantize_blocks",
    "quantize_tiles",
    "read_loads",
    "read_placement",
    "rebalance_experts",
    "refine_placement",
    "replay",
    "replay_figure",
    "replay_text",
    "restore_state",
    "save_state",
    "scaled_grouped_matmul",
    "scaled_matmul",
    "sequence_balance_loss",
    "sigmoid_group_top_k",
    "softmax_top_k",
    "sum_of_last",
    "update_bias",
    "write_placement",
]

plugins.skip_cuda_check()  # before jax loads them
__getattr__, __dir__ = lookup.attach(
    __name__,
    {
        "BalancerState": "eplb_jax.serving",
        "ExpertBalancer": "eplb_jax.serving",
        "ExpertParallel": "eplb_jax.layer",
        "ExpertTables": "eplb_jax.placement",
        "ExpertWeights": "eplb_jax.layer",
        "LoadEstimator": "eplb_jax.placement",
        "MicrobatchPlan": "eplb_jax.layer",
        "MoE": "eplb_jax.layer",
        "MoEStats": "eplb_jax.layer",
        "Outcome": "eplb_jax.recordings",
        "PlacementFile": "eplb_jax.files",
        "Recording": "eplb_jax.files",
        "Routing": "eplb_jax.layer",
        "Scaled": "eplb_jax.products",
        "balancedness": "eplb_jax.placement",
        "balancedness_bound": "eplb_jax.placement",
        "balancedness_figure": "eplb_jax.pictures",
        "count_migrated": "eplb_jax.serving",
        "grouped_matmul": "eplb_jax.products",
        "migrate": "eplb_jax.serving",
        "mix_experts": "eplb_jax.layer",
        "moving_average": "eplb_jax.placement",
        "physical_weights": "eplb_jax.layer",
        "placement_figure": "eplb_jax.pictures",
        "placement_text": "eplb_jax.pictures",
        "plan_microbatch": "eplb_jax.layer",
        "quantize_blocks": "eplb_jax.products",
        "quantize_tiles": "eplb_jax.products",
        "read_loads": "eplb_jax.files",
        "read_placement": "eplb_jax.files",
        "rebalance_experts": "eplb_jax.placement",
        "refine_placement": "eplb_jax.placement",
        "replay": "eplb_jax.recordings",
        "replay_figure": "eplb_jax.pictures",
        "replay_text": "eplb_jax.pictures",
        "restore_state": "eplb_jax.placement",
        "save_state": "eplb_jax.placement",
        "scaled_grouped_matmul": "eplb_jax.products",
        "scaled_matmul": "eplb_jax.products",
        "sequence_balance_loss": "eplb_jax.layer",
        "sigmoid_group_top_k": "eplb_jax.layer",
        "softmax_top_k": "eplb_jax.layer",
        "sum_of_last": "eplb_jax.placement",
        "update_bias": "eplb_jax.layer",
        "write_placement": "eplb_jax.files",
    },
)
