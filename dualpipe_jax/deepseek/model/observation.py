"""Statistics of the MoE layers, from the stages' auxiliary outputs to the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.layout import Layout
from eplb_jax import ExpertParallel
from eplb_jax.layer import MoEStats, bytes_of_token

Stats = dict[str, jax.Array]


def stats_of(stats: MoEStats, parallel: ExpertParallel) -> Stats:
    """Returns the statistics of one MoE layer that are added up over microbatches."""
    some = {
        "tokens_per_expert": stats.tokens_per_expert,
        "overflow": stats.overflow,
        "balance_loss": stats.balance_loss,
    }
    if parallel.is_exact:
        home_DI = stats.tokens_per_physical_expert.reshape(parallel.num_devices, -1)
        some |= {
            "fullest_device": stats.device_rows.max(),
            "fullest_home": home_DI.sum(axis=1, dtype=jnp.int32).max(),
            "num_fetched": stats.num_fetched,
            "num_moved": stats.num_moved,
        }
    return some


def no_stats(config: DeepSeekConfig, parallel: ExpertParallel) -> Stats:
    """Returns the statistics of a layer without experts, which are zeros."""
    none = jnp.zeros((), jnp.int32)
    some = {
        "tokens_per_expert": jnp.zeros(config.n_routed_experts, jnp.int32),
        "overflow": none,
        "balance_loss": jnp.zeros((), jnp.float32),
    }
    if parallel.is_exact:
        names = "fullest_device", "fullest_home", "num_fetched", "num_moved"
        some |= dict.fromkeys(names, none)
    return some


def exact_metrics(
    stats: Stats,
    config: DeepSeekConfig,
    parallel: ExpertParallel,
    dtype: Any,
    share: int,
) -> Stats:
    """How even the devices were in each microbatch, and what it took.

    Args:
      stats: of all layers, added up over microbatches and devices.
      config: the sizes.
      parallel: with exact balance.
      dtype: of weights and tokens that travel.
      share: how often each layer's statistics were added up.

    Returns:
      `balancedness_exact`, mean over maximum of the devices' rows, and
      `balancedness_before`, the same if each row were computed where the weights of its
      expert came from. Per device, layer and microbatch: `fetched_experts`,
      `fetched_mib`, the bytes of their weights, and `dispatched_mib`, those of the
      choices that go to other devices, each counted by itself.
    """
    rows = stats["tokens_per_expert"].sum().astype(jnp.float32) / parallel.num_devices

    # Each token has one row more of the shared expert, if these are planned.
    with_shared = 1 + parallel.spread_shared / config.num_experts_per_tok

    def balancedness(rows: jax.Array, fullest_L: jax.Array) -> jax.Array:
        return rows / jnp.maximum(fullest_L.sum(), 1).astype(jnp.float32)

    def each(count_L: jax.Array) -> jax.Array:
        return count_L.astype(jnp.float32).mean() / (share * parallel.num_devices)

    dim, hidden = config.hidden_size, config.moe_intermediate_size
    bytes_of_expert = 3 * dim * hidden * jnp.dtype(dtype).itemsize
    fetched = each(stats["num_fetched"])
    moved = each(stats["num_moved"])
    return {
        "balancedness_exact": balancedness(rows * with_shared, stats["fullest_device"]),
        "balancedness_before": balancedness(rows, stats["fullest_home"]),
        "fetched_experts": fetched,
        "fetched_mib": fetched * (bytes_of_expert / 2**20),
        "dispatched_mib": moved
        * (bytes_of_token(parallel.payload, dim, dtype) / 2**20),
    }


def stack_stats(
    config: DeepSeekConfig,
    parallel: ExpertParallel,
    layout: Layout,
    stages: Mapping[str, Any],
    mtp: Stats | None,
) -> Stats:
    """Stacks the statistics of all MoE layers, in model order.

    Args:
      config: the sizes.
      parallel: how the experts are divided.
      layout: which layer is at which position.
      stages: by layer position (its number, as text), statistics of the stages' layers.
      mtp: statistics of the multi-token prediction module, which comes last.

    Returns:
      Statistics with a leading axis of layers; empty for a model without experts.
    """
    first, last = config.first_k_dense_replace, config.num_hidden_layers
    if last == first and mtp is None:
        return {}
    every = [stages.get(str(at)) for at in range(layout.num_layer_positions)]
    stacked = {}
    for name in no_stats(config, parallel):
        column = [None if stats is None else stats[name] for stats in every]
        rows = layout.to_layers(column, first, last)
        stacked[name] = (
            rows if mtp is None else jnp.concatenate([rows, mtp[name][None]])
        )
    return stacked
