"""A DeepSeek-V3-style model: attention, experts, and its layout over pipeline stages.

Imports: schedules, planning, executor, train, eplb_jax.placement, eplb_jax.layer.
"""

from dualpipe_jax.deepseek.model.balancing import EplbConfig, RouterState as RouterState
from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.layers import Head as Head, Layer as Layer
from dualpipe_jax.deepseek.model.losses import logits_of as logits_of
from dualpipe_jax.deepseek.model.model import DeepSeek
from dualpipe_jax.deepseek.model.stages import DeepSeekPipeline as DeepSeekPipeline
from dualpipe_jax.deepseek.model.trees import (
    map_with_names as map_with_names,
    parameters as parameters,
)

__all__ = [
    "DeepSeek",
    "DeepSeekConfig",
    "EplbConfig",
]
