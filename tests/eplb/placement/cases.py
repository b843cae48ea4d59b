"""Loads and sizes that the tests share, so that jit compiles each program once."""

import functools

import jax
import numpy as np

from eplb_jax.placement.placement import rebalance_experts

LAYERS, EXPERTS = 3, 32
# num_replicas, num_groups, num_nodes, num_gpus: four physical experts per GPU, three
# GPUs per node.
SIZES = (48, 8, 4, 12)
REPLICAS, GROUPS, NODES, DEVICES = SIZES


def lognormal(seed, *shape, sigma=1.0):
    rng = np.random.default_rng(seed)
    return rng.lognormal(0, sigma, shape or (LAYERS, EXPERTS)).astype(np.float32)


@functools.cache
def traced(policy):
    """Returns jitted `rebalance_experts`, values unchecked, and its traces."""
    traces = []

    @jax.jit
    def place(weight, capacity, price):
        traces.append(1)
        return rebalance_experts(
            weight, *SIZES, policy=policy, device_capacity=capacity, remote_price=price
        )

    return place, traces
