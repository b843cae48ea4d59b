"""A DeepSeek-V3-style model: attention, experts, and its layout over pipeline stages.

The call chain of a training step: `pipeline` (what the job calls), `preparation` (once
per step), `stage` and `ends` (per microbatch), `balancing` (after the step). Shape
suffixes: see `dualpipe_jax.deepseek`.

Imports: checked, schedules, planning, executor, train, eplb_jax.placement,
eplb_jax.products, eplb_jax.layer.
"""

from dualpipe_jax.deepseek.model.balancing import RouterState as RouterState
from dualpipe_jax.deepseek.model.config import (
    MAX_VALUES as MAX_VALUES,
    DeepSeekConfig,
    Positive as Positive,
)
from dualpipe_jax.deepseek.model.layers import (
    Head as Head,
    Layer as Layer,
    initial_layer as initial_layer,
)
from dualpipe_jax.deepseek.model.losses import logits_of as logits_of
from dualpipe_jax.deepseek.model.model import DeepSeek
from dualpipe_jax.deepseek.model.pipeline import DeepSeekPipeline as DeepSeekPipeline
from dualpipe_jax.deepseek.model.placement_config import (
    ComputeDtype as ComputeDtype,
    EplbConfig,
    NumRedundant as NumRedundant,
    PlacementConfig as PlacementConfig,
    check_balance as check_balance,
    rows_of_buffer as rows_of_buffer,
)
from dualpipe_jax.deepseek.model.published import (
    CONFIG_FILE as CONFIG_FILE,
    read_config as read_config,
)
from dualpipe_jax.deepseek.model.restoring import restore_run as restore_run
from dualpipe_jax.deepseek.model.rope import RopeScaling
from dualpipe_jax.deepseek.model.trees import (
    map_with_names as map_with_names,
    parameters as parameters,
)

__all__ = [
    "DeepSeek",
    "DeepSeekConfig",
    "EplbConfig",
    "RopeScaling",
]
