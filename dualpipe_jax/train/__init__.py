"""The training job: a config, real text, one jitted pipelined step, and its loop.

A step's call chain: `loop` (the job), `step` (the jitted programs), `model` (what a
model is), then `executor`.

Imports: checked, files, tokens, processes, schedules, schedules.generators, lowering,
pictures, executor, gpu.overlap, profiles.
"""

import importlib.util

try:
    if importlib.util.find_spec("matplotlib") is None:  # pictures import it late
        raise ModuleNotFoundError(name="matplotlib")
    from dualpipe_jax.processes import distributed as distributed
    from dualpipe_jax.processes.distributed import on_host as on_host
    from dualpipe_jax.train.checkpoint import Checkpoints as Checkpoints
    from dualpipe_jax.train.compilation_cache import (
        compilation_cache as compilation_cache,
        for_children as for_children,
    )
    from dualpipe_jax.train.compiling import (
        CompileProgress as CompileProgress,
        Job as Job,
        compile_together as compile_together,
        rare_collections as rare_collections,
    )
    from dualpipe_jax.train.config import (
        AXES as AXES,
        OptimizerConfig,
        Platform as Platform,
        StepConfig as StepConfig,
        TrainConfig,
        load_as as load_as,
        load_config,
    )
    from dualpipe_jax.train.data import Text, load_text
    from dualpipe_jax.train.folder import (
        LAUNCHES as LAUNCHES,
        TOKENIZER as TOKENIZER,
        newest_checkpoint as newest_checkpoint,
    )
    from dualpipe_jax.train.loop import Result, train
    from dualpipe_jax.train.mesh import (
        ask_for_devices as ask_for_devices,
        check_memory as check_memory,
    )
    from dualpipe_jax.train.model import ModelConfig, PipelineModel
    from dualpipe_jax.train.programs import Programs
    from dualpipe_jax.train.report import write_report as write_report
    from dualpipe_jax.train.signals import stop_signals as stop_signals
    from dualpipe_jax.train.state import TrainState, rest_specs as rest_specs
    from dualpipe_jax.train.step import make_programs
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
