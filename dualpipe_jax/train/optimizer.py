"""The optimizer of a run, from its config: optax's AdamW."""

from __future__ import annotations

from typing import Any

import jax
import optax

from dualpipe_jax.executor import PipelineParams
from dualpipe_jax.train.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine decay until `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        # A run that is shorter than its warm-up never reaches the peak.
        decay_steps=max(num_steps, config.warmup_steps + 1),
        end_value=config.final_fraction * config.learning_rate,
    )


def num_updates(opt_state: Any) -> jax.Array:
    """How many updates an optimizer of `make_optimizer` has made: [] int32."""
    return optax.tree.get(
        opt_state,
        "count",
        filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
    )


def make_optimizer(
    config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
    """AdamW after clipping, with the settings of `config`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            # The warm-up's first value is 0, and would make the first update empty.
            lambda count: learning_rate(config, num_steps)(count + 1),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
            mu_dtype=config.mean_dtype,
        ),
    )


def _is_matrix(params: PipelineParams) -> PipelineParams:
    # A stage's leaves have one more axis, that of the stages.
    return PipelineParams(
        stages=jax.tree.map(lambda leaf: leaf.ndim > 2, params.stages),
        embed=jax.tree.map(lambda leaf: leaf.ndim > 1, params.embed),
        head=jax.tree.map(lambda leaf: leaf.ndim > 1, params.head),
    )
