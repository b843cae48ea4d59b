"""A DeepSeek-V3-style model for the training job, and a small server of it.

Imports: deepseek.model, deepseek.serve.
"""

from dualpipe_jax.deepseek.model import DeepSeek, DeepSeekConfig, EplbConfig
from dualpipe_jax.deepseek.serve import ServeConfig

__all__ = [
    "DeepSeek",
    "DeepSeekConfig",
    "EplbConfig",
    "ServeConfig",
]
