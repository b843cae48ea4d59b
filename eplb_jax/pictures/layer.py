"""One layer's placement, read for a text or a picture.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from eplb_jax.placement import as_placement, physical_expert_loads


def read_layer(
    weight: Any,
    physical_to_logical_map: Any,
    num_devices: int,
    device_capacity: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns loads, experts, and each one's fraction of its device's fair share."""
    weight_E = np.asarray(weight, np.float32)
    expert_S = np.asarray(as_placement(physical_to_logical_map, weight_E.size))
    if weight_E.ndim != 1 or expert_S.ndim != 1 or expert_S.size % num_devices:
        raise ValueError(
            f"weight has shape {weight_E.shape} and physical_to_logical_map "
            f"{expert_S.shape}, but one layer is shown: pass [experts] and [physical "
            f"experts], a multiple of {num_devices=}."
        )
    load_S = np.asarray(
        physical_expert_loads(jnp.asarray(weight_E[None]), jnp.asarray(expert_S[None]))
    )[0]
    capacity_D = np.ones(num_devices)
    if device_capacity is not None:
        capacity_D = np.asarray(device_capacity, np.float64)
    share_D = capacity_D / capacity_D.sum() * max(load_S.sum(), 1e-30)
    safe_D = np.where(share_D > 0, share_D, np.inf)
    used_DI = load_S.reshape(num_devices, -1) / safe_D[:, None]
    return weight_E, expert_S.reshape(num_devices, -1), used_DI


def count_by_expert(expert_DI: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts the replicas of each expert."""
    return np.bincount(expert_DI[expert_DI >= 0], minlength=num_experts)
