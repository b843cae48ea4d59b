"""Agreement of the devices on a plan.

Each device computes the plan itself, from the same numbers. If two devices had
different plans, outputs would be wrong without any error; so plans are compared, and
refused if they differ.

Shape suffixes: see `eplb_jax`; here P layers of a plan.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from eplb_jax.serving.state import RebalancePlan


def agree(plan: RebalancePlan, axis_name: str) -> RebalancePlan:
    """Returns the plan if all devices have the same, else one that changes nothing.

    Args:
      plan: of this device.
      axis_name: mesh axis (or axes) of the devices, inside `jax.shard_map`.

    Returns:
      A `RebalancePlan`.
    """
    layer_P = plan.layers.astype(jnp.uint32)
    number = (plan.tables.checksum() * (2 * layer_P + 1)).sum(dtype=jnp.uint32)
    # Reduced as int32: not every backend reduces unsigned integers.
    number = lax.bitcast_convert_type(number, jnp.int32)
    is_same = lax.pmin(number, axis_name) == lax.pmax(number, axis_name)
    return plan._replace(
        is_changed=plan.is_changed & is_same,
        num_moves=jnp.where(is_same, plan.num_moves, 0),
        is_rejected=plan.is_rejected & is_same,
        is_refused=~is_same,
    )
