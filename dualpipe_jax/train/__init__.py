"""The training job: a config, real text, one jitted pipelined step, and its loop."""

try:
    from dualpipe_jax.train.config import (
        OptimizerConfig,
        TrainConfig,
        load_config,
    )
    from dualpipe_jax.train.data import Text, load_text
    from dualpipe_jax.train.loop import Result, train
    from dualpipe_jax.train.model import ModelConfig, PipelineModel
    from dualpipe_jax.train.state import TrainState
    from dualpipe_jax.train.step import Programs, make_programs
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("dualpipe_jax"):
        raise
    raise ImportError(
        f"training needs {error.name}; pip install 'dualpipe-jax[train]'."
    ) from error

__all__ = [
    "ModelConfig",
    "OptimizerConfig",
    "PipelineModel",
    "Programs",
    "Result",
    "Text",
    "TrainConfig",
    "TrainState",
    "load_config",
    "load_text",
    "make_programs",
    "train",
]
