"""The training job's configuration: frozen dataclasses, and how a config file is found.

A config is a Python file whose `config()` returns a `TrainConfig`. The model is
any object with `build(num_stages)`, so that the loop knows no architecture.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from dualpipe_jax.pipeline import PipelineParams
from dualpipe_jax.schedule import Schedule


class PipelineFns(NamedTuple):
    """What the pipeline needs to know about a model; all functions are pure.

    Attributes:
      init: key -> `PipelineParams`, whose stages' leaves are [num_stages, ...].
      embed_fn: (embedding, tokens [batch, sequence]) -> activations.
      stage_fn: (stage parameters, activations) -> activations.
      loss_fn: (head, activations, targets [batch, sequence]) -> mean loss, nats.
    """

    init: Callable[[jax.Array], PipelineParams]
    embed_fn: Callable[..., Any]
    stage_fn: Callable[..., Any]
    loss_fn: Callable[..., Any]


class ModelConfig(Protocol):
    """A frozen dataclass that can lay its model over a number of stages."""

    def build(self, num_stages: int) -> PipelineFns: ...


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and clipping by the global norm.

    Attributes:
      learning_rate: the peak.
      warmup_steps: steps until the peak is reached.
      final_fraction: the last step's learning rate over the peak.
      b1: decay of the mean of the gradients.
      b2: decay of the mean of their squares.
      weight_decay: applied to matrices only, not to the scales of norms.
      clip_norm: the largest global gradient norm that an update may have.
    """

    learning_rate: float
    warmup_steps: int
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run, except for what the command line says (data, folder).

    Attributes:
      name: the run's folder is runs/<name> unless the command line says otherwise.
      model: anything with `build(num_stages) -> PipelineFns`.
      mesh: axis name -> size; `pp` is the pipeline, `dp` splits each microbatch.
      schedule: (num_ranks, num_microbatches) -> Schedule, such as `dualpipe`.
      num_microbatches: microbatches of one step.
      microbatch_size: sequences in one microbatch, over all of `dp`.
      sequence_length: bytes that one sequence predicts.
      num_steps: optimizer steps of the whole run.
      optimizer: see `OptimizerConfig`.
      eval_every: steps between evaluations on held-out text.
      checkpoint_every: steps between checkpoints; the last step writes one too.
      held_out_fraction: part of the text that is never trained on.
      seed: of the parameters and of the data order.
      platform: `"cpu"` trains on virtual CPU devices whatever else the machine has,
        unless JAX_PLATFORMS is set; None takes jax's own choice.
    """

    name: str
    model: ModelConfig
    mesh: Mapping[str, int]
    schedule: Callable[[int, int], Schedule]
    num_microbatches: int
    microbatch_size: int
    sequence_length: int
    num_steps: int
    optimizer: OptimizerConfig
    eval_every: int = 50
    checkpoint_every: int = 100
    held_out_fraction: float = 0.05
    seed: int = 0
    platform: str | None = None

    def __post_init__(self):
        for field in (
            "microbatch_size",
            "sequence_length",
            "num_steps",
            "eval_every",
            "checkpoint_every",
        ):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
        if not {"pp", "dp"} <= set(self.mesh):
            raise ValueError(f"mesh={dict(self.mesh)} must have the axes pp and dp.")
        if any(size < 1 for size in self.mesh.values()):
            raise ValueError(f"mesh={dict(self.mesh)}: each size must be at least 1.")
        if self.microbatch_size % self.mesh["dp"]:
            raise ValueError(
                f"{self.microbatch_size=} must be divisible by the dp axis, "
                f"{self.mesh['dp']}."
            )
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"{self.held_out_fraction=} must lie between 0 and 1, neither included."
            )

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def tokens_per_step(self) -> int:
        return self.num_microbatches * self.microbatch_size * self.sequence_length

    def to_json(self) -> str:
        """The configuration as readable text; functions are given by their name."""
        return json.dumps(
            dataclasses.asdict(self),
            indent=2,
            default=lambda value: getattr(value, "__name__", str(value)),
        )


def load_config(name: str) -> TrainConfig:
    """Loads the configuration that `config()` of a file returns.

    Args:
      name: a path to a Python file, or the name of a module of `configs`.

    Raises:
      ValueError: there is no such file, or it defines no `config()`.
    """
    path = Path(name)
    if path.suffix != ".py":
        path = _configs_folder() / f"{name}.py"
    if not path.is_file():
        known = sorted(
            file.stem for file in _configs_folder().glob("[!_]*.py") if file.is_file()
        )
        raise ValueError(
            f"config {name!r} not found (looked for {path}); give a Python file that "
            f"defines config(), or one of {', '.join(known)}."
        )
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, "config", None)
    if function is None:
        raise ValueError(f"{path} defines no config(); it must return a TrainConfig.")
    return function()


def _configs_folder() -> Path:
    import configs

    return Path(configs.__path__[0])
