"""Statistics of the MoE layers, from the stages' auxiliary outputs to the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.layout import Layout
from eplb_jax.layer import MoEStats

Stats = dict[str, jax.Array]


def stats_of(stats: MoEStats) -> Stats:
    """Returns the statistics of one MoE layer that are added up over microbatches."""
    return {
        "tokens_per_expert": stats.tokens_per_expert,
        "overflow": stats.overflow,
        "balance_loss": stats.balance_loss,
    }


def no_stats(config: DeepSeekConfig) -> Stats:
    """Returns the statistics of a layer without experts, which are zeros."""
    return {
        "tokens_per_expert": jnp.zeros(config.n_routed_experts, jnp.int32),
        "overflow": jnp.zeros((), jnp.int32),
        "balance_loss": jnp.zeros((), jnp.float32),
    }


def stack_stats(
    config: DeepSeekConfig, layout: Layout, stages: Mapping[str, Any], mtp: Stats | None
) -> Stats:
    """Stacks the statistics of all MoE layers, in model order.

    Args:
      config: the sizes.
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
    for name in no_stats(config):
        column = [None if stats is None else stats[name] for stats in every]
        rows = layout.to_layers(column, first, last)
        stacked[name] = (
            rows if mtp is None else jnp.concatenate([rows, mtp[name][None]])
        )
    return stacked
