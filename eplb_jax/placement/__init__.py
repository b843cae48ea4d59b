"""Where experts go: placements, their quality, and the tables that hold them.

A rebalance's call chain: `placement`, `tables`, then `layer.dispatch` and `layer.moe`.

Imports: nothing.
"""

from eplb_jax.placement.arrays import (
    add_saturating as add_saturating,
    divisor_from as divisor_from,
    put_like as put_like,
    take_or_zero as take_or_zero,
)
from eplb_jax.placement.checks import (
    as_capacity as as_capacity,
    as_placement as as_placement,
    check_choices as check_choices,
    check_counts as check_counts,
    is_count as is_count,
    is_fraction as is_fraction,
    is_traced as is_traced,
)
from eplb_jax.placement.hashing import mix_bits as mix_bits
from eplb_jax.placement.load import (
    LoadEstimator,
    moving_average,
    restore_state,
    save_state,
    sum_of_last,
)
from eplb_jax.placement.npz import (
    check_size as check_size,
    read_npy as read_npy,
    read_npz as read_npz,
)
from eplb_jax.placement.placement import (
    Policy as Policy,
    choose_policy as choose_policy,
    rebalance_experts,
)
from eplb_jax.placement.quality import (
    balancedness,
    balancedness_bound,
    count_duplicates as count_duplicates,
    count_moves as count_moves,
    device_loads as device_loads,
    device_uses as device_uses,
    physical_expert_loads as physical_expert_loads,
    remote_share as remote_share,
    score_placement as score_placement,
)
from eplb_jax.placement.refine import (
    refine_and_look_ahead as refine_and_look_ahead,
    refine_placement,
)
from eplb_jax.placement.scale import as_loads as as_loads
from eplb_jax.placement.soft import home_nodes as home_nodes
from eplb_jax.placement.tables import ExpertTables

__all__ = [
    "ExpertTables",
    "LoadEstimator",
    "balancedness",
    "balancedness_bound",
    "moving_average",
    "rebalance_experts",
    "refine_placement",
    "restore_state",
    "save_state",
    "sum_of_last",
]
