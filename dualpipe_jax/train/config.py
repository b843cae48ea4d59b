"""The training job's configuration: frozen dataclasses, and how a config file is found.

A config is a Python file whose `config()` returns a `TrainConfig`. The model is
a `ModelConfig`, so that the loop knows no architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol, TypeVar, runtime_checkable

from jax.sharding import Mesh

from dualpipe_jax.checked import INT32_MAX, Count, Range, Size, check_fields
from dualpipe_jax.executor import check_choice
from dualpipe_jax.schedules import Schedule
from dualpipe_jax.schedules.generators import SCHEDULES, check_size
from dualpipe_jax.train.model import ModelConfig
from eplb_jax import lookup

AXES = ("pp", "dp", "ep")
Platform = Literal["cpu", "gpu", "cuda", "rocm", "tpu"]
# In a checkout a link to its folder configs/. Not imported: recipes import this room.
_RECIPES = Path(__file__).parent.parent / "configs"
Config = TypeVar("Config")


@runtime_checkable
class StepConfig(Protocol):
    """A configuration of a step that can be compiled for any mesh of its size."""

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Sizes of the mesh's axes."""
        ...

    def lower_step(self, mesh: Mesh) -> Any:
        """The step, lowered for the devices of a mesh."""
        ...


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
      mean_dtype: dtype of the mean of the gradients, `"float32"` or `"bfloat16"`;
        their squares, parameters and gradients are float32.
    """

    learning_rate: Annotated[float, Range(0)]
    warmup_steps: Size
    final_fraction: Annotated[float, Range(0, 1)] = 0.1
    b1: Annotated[float, Range(0, 1, below=True)] = 0.9
    b2: Annotated[float, Range(0, 1, below=True)] = 0.95
    weight_decay: Annotated[float, Range(0)] = 0.1
    clip_norm: Annotated[float, Range(0, above=True)] = 1.0
    mean_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, except for its data and folder, which the command line names.

    Attributes:
      name: the run's folder is `runs/NAME` unless the command line names another.
      model: see `ModelConfig`.
      mesh: axis name -> size. `pp` is the pipeline; `dp` and `ep` split each microbatch
        and are 1 where they are not given; `ep` splits the experts too.
      schedule: a name in `SCHEDULES`, or (num_ranks, num_microbatches) -> Schedule,
        such as `functools.partial(interleaved_1f1b, stages_per_rank=4)`.
      num_microbatches: microbatches per step.
      microbatch_size: sequences in one microbatch, over all of `dp` and `ep`.
      sequence_length: bytes that one sequence predicts.
      num_steps: optimizer steps of the whole run.
      optimizer: see `OptimizerConfig`.
      eval_every: steps between evaluations on held-out text.
      checkpoint_every: steps between checkpoints; the last step writes one too.
      max_skipped_steps: how many steps in a row may be skipped because their loss or
        gradient is not finite, as loss scaling does: the state stays as it is, and the
        next step has the next data. One more of them ends the run; at 0 the first does.
      ignore_index: a token that is no target, such as the padding of a .npy file: the
        loss is the mean over the other targets of a step, and the model's loss must
        take their weights (see `PipelineModel.loss`). None: all tokens are targets.
      trainable: which parameters are trained: see `pipeline_value_and_grad`. The others
        stay as they are, without gradients and optimizer state; so do integers. None:
        all others.
      held_out_fraction: part of the text that is never trained on.
      seed: of the parameters and of the data order.
      shard_at_rest: divides parameters and optimizer state over `dp` and `ep` too,
        where a matrix can be; a step gathers what the pipeline needs whole (ZeRO-1).
      pretrained: folder of a published model whose weights the run begins with; None:
        it begins with random ones.
      sample_tokens: tokens of generated text at the end of the run.
      overlap: see `pipeline_value_and_grad`.
      platform: `"cpu"` trains on virtual CPU devices even where there are others,
        unless JAX_PLATFORMS is set; None leaves the choice to jax.
    """

    name: str
    model: ModelConfig
    mesh: Mapping[Literal["pp", "dp", "ep"], Count]
    schedule: str | Callable[[int, int], Schedule]
    num_microbatches: Count
    microbatch_size: Count
    sequence_length: Count
    num_steps: Count
    optimizer: OptimizerConfig
    eval_every: Count = 50
    checkpoint_every: Count = 100
    max_skipped_steps: Size = 0
    ignore_index: Size | None = None
    trainable: Any = None
    held_out_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.05
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 0
    shard_at_rest: bool = False
    pretrained: str | None = None
    sample_tokens: Annotated[int, Range(0, 65_536)] = 0  # one forward pass for each
    platform: Platform | None = None
    overlap: bool | None = None

    def __post_init__(self):
        check_fields(self)
        # It names a folder below `runs`.
        if not re.fullmatch(r"[^./\\\0][^/\\\0]{0,99}", self.name):
            raise ValueError(
                f"name={self.name[:100]!r} must be the name of a folder: up to 100 "
                "characters, without a slash, and without a dot at its beginning."
            )
        if "pp" not in self.mesh:
            raise ValueError(
                f"mesh={dict(self.mesh)} must have the axis pp, and may have dp and ep."
            )
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r:.60} must be one of {', '.join(SCHEDULES)}."
            )
        check_size(self.mesh["pp"], self.num_microbatches)
        if self.trainable is not None:
            check_choice(self.trainable, "trainable")
        if self.tokens_per_step > INT32_MAX:
            raise ValueError(
                "num_microbatches * microbatch_size * sequence_length = "
                f"{self.tokens_per_step:,} must be at most {INT32_MAX:,} tokens."
            )
        split = self.mesh_shape["dp"] * self.mesh_shape["ep"]
        if self.microbatch_size % split:
            raise ValueError(
                f"{self.microbatch_size=} must be a multiple of {split}, the devices "
                "of the axes dp and ep together."
            )

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Sizes of all of `AXES`."""
        return {axis: self.mesh.get(axis, 1) for axis in AXES}

    def make_schedule(self) -> Schedule:
        """The schedule for this mesh and this number of microbatches.

        Raises:
          ValueError: there is none for these numbers.
        """
        sizes = self.mesh["pp"], self.num_microbatches
        if isinstance(self.schedule, str):
            return SCHEDULES[self.schedule](*sizes)
        name = _name_of(self.schedule)
        try:
            schedule = self.schedule(*sizes)
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"schedule={name} fails for {sizes}: {kind}{error}"
            ) from error
        if not isinstance(schedule, Schedule):
            raise ValueError(
                f"schedule={name} returns a {type(schedule).__name__}; it must return "
                "the Schedule of so many ranks and microbatches."
            )
        if (schedule.num_ranks, schedule.num_microbatches) != sizes:
            raise ValueError(
                f"schedule={name} returns one of {schedule.num_ranks} ranks and "
                f"{schedule.num_microbatches} microbatches; the config has {sizes}."
            )
        return schedule

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def tokens_per_step(self) -> int:
        return self.num_microbatches * self.microbatch_size * self.sequence_length

    def lower_step(self, mesh: Mesh) -> Any:
        """The train step, lowered for the devices of a mesh."""
        return lookup.find("dualpipe_jax.train.step:lower_step")(self, mesh)

    def to_json(self) -> str:
        """The configuration as readable text, with functions by name."""
        return json.dumps(
            dataclasses.asdict(self),
            indent=2,
            default=_name_of,
        )


def _name_of(value: Any) -> str:
    """Returns a function's name; a partial one is shown with its arguments.

    Without addresses: processes compare their configurations as text.

    Examples:
      >>> import functools
      >>> _name_of(functools.partial(SCHEDULES["looped_bfs"], stages_per_rank=4))
      'functools.partial(<function looped_bfs>, stages_per_rank=4)'
    """
    return getattr(value, "__name__", re.sub(r" at 0x[0-9a-fA-F]+", "", str(value)))


def load_config(name: str) -> TrainConfig:
    """Loads the configuration that a function of a file returns.

    Args:
      name: a path to a Python file, or the name of one that this package comes with
        (`dualpipe_jax.configs`), or of any module; `:function` after it names the
        function, `config` by default.

    Raises:
      ValueError: there is no such file or function, or it returns something else.
    """
    return load_as(TrainConfig, name)


def load_as(kind: type[Config], name: str) -> Config:
    """The same for configurations of any kind.

    Args:
      kind: what the function must return.
      name: see `load_config`.
    """
    where, sign, function = name.rpartition(":")
    if not sign:
        where, function = name, "config"
    module = _load(where)
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(
            f"{module.__file__} defines no {function}(); it must return a "
            f"{kind.__name__}. To use another function, name it after a colon, as in "
            "profiles:training."
        )
    with _errors_in_one_line(Path(str(module.__file__))):
        config = make()
    if not isinstance(config, kind):
        raise ValueError(
            f"{function}() of {module.__file__} returns a {type(config).__name__}; it "
            f"must return a {kind.__name__}."
        )
    return config


@contextlib.contextmanager
def _errors_in_one_line(path: Path) -> Iterator[None]:
    """Turns whatever the code of a config raises into a `ValueError` of one line."""
    try:
        yield
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == path
        ]
        line, reason = lines[-1] if lines else None, str(error)
        if isinstance(error, SyntaxError):
            line, reason = error.lineno, error.msg
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        where = f"{path}, line {line}" if line else str(path)
        raise ValueError(f"{where}: {' '.join(reason.split())}") from error


def _load(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix != ".py":
        path = _RECIPES / f"{name}.py"
    if path.is_file():
        spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with _errors_in_one_line(path):
            spec.loader.exec_module(module)
        return module
    if "." in name and not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # If the module itself fails to import another one, that is an error.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    known = sorted(file.stem for file in _RECIPES.glob("[!_]*.py"))
    raise ValueError(
        f"config {name!r} not found (looked for {path}); give a Python file that "
        f"defines config(), or one of {', '.join(known)}."
    )
