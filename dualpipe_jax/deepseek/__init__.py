"""A DeepSeek-V3-style model for the training job: where both packages meet."""

from dualpipe_jax.deepseek.balancing import EplbConfig
from dualpipe_jax.deepseek.config import DeepSeekConfig
from dualpipe_jax.deepseek.model import DeepSeek
from dualpipe_jax.deepseek.serve.config import ServeConfig

__all__ = ["DeepSeek", "DeepSeekConfig", "EplbConfig", "ServeConfig"]
