"""A published model in memory: what users call."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from dualpipe_jax.deepseek.model import (
    DeepSeek,
    DeepSeekConfig,
    DeepSeekPipeline,
    RouterState,
    read_config,
)
from dualpipe_jax.deepseek.pretrained.forward import batch_logits, build, complete_mesh
from dualpipe_jax.deepseek.pretrained.names import (
    copies,
    layer_prefix,
    published_shapes,
)
from dualpipe_jax.deepseek.pretrained.reading import read_bias, read_params
from dualpipe_jax.deepseek.pretrained.saving import MAX_FILE_BYTES, save_folder
from dualpipe_jax.deepseek.pretrained.source import Source
from dualpipe_jax.executor import PipelineParams
from dualpipe_jax.tokens import PublishedTokenizer
from dualpipe_jax.train import rest_specs

P = PartitionSpec
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A published model in memory; `load_pretrained` returns it.

    Attributes:
      config: the architecture. Without a multi-token prediction module if the folder
        has no weights for one.
      params: `PipelineParams` on the mesh, one stage for each of its ranks.
      buffers: what a model has besides: the router's bias, [MoE layers, experts].
      model: the model that both are laid out for. Another layout of the same
        architecture takes them by its `convert_params` and `convert_buffers`.
      mesh: the devices, with the axes pp, dp and ep.
      source: the folder.
    """

    config: DeepSeekConfig
    params: PipelineParams
    buffers: RouterState
    model: DeepSeekPipeline
    mesh: Mesh
    source: Source

    @functools.cached_property
    def tokenizer(self) -> PublishedTokenizer:
        """The tokenizer of the folder: `encode`, `decode`, `encode_chat`.

        Raises:
          ImportError: the package tokenizers is not installed.
          ValueError: the folder has none, or one of a larger vocabulary.
        """
        tokenizer = PublishedTokenizer(self.source.folder)
        tokenizer.check_fits(self.config.vocab_size)
        return tokenizer

    def logits(self, tokens: ArrayLike) -> jax.Array:
        """Computes logits, which compiles once for each shape.

        Args:
          tokens: [batch, length] integers. The sequences of a batch are divided over
            the mesh, and padded to whole microbatches.

        Returns:
          [batch, length, vocabulary] float32: at each position those of the next token.

        Raises:
          ValueError: tokens of another shape, or of another vocabulary.
        """
        given = np.asarray(tokens)
        if given.ndim != 2 or not given.size or given.dtype.kind not in "iu":
            raise ValueError(
                f"tokens has shape {given.shape} and dtype {given.dtype}; it must be "
                "[batch, length] integers."
            )
        if given.min() < 0 or given.max() >= self.config.vocab_size:
            raise ValueError(
                f"tokens holds numbers from {given.min()} to {given.max()}, but the "
                f"model's are from 0 to {self.config.vocab_size - 1}; use its "
                "tokenizer."
            )
        inputs = jnp.asarray(given, jnp.int32)
        return batch_logits(self.model, self.mesh, self.params, self.buffers, inputs)

    def save(
        self, folder: str | os.PathLike[str], *, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        """Writes the model as a Hugging Face folder.

        Names, shapes and dtypes are those of the folder that was read, float8 weights
        with their scales included, and so are all other files, such as the tokenizer's.

        Args:
          folder: a new one.
          max_file_bytes: of a file of weights; one tensor may be larger.

        Raises:
          ValueError: the folder exists.
        """
        state = self.model, self.params, self.buffers
        save_folder(folder, self.source, *state, max_file_bytes)


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> Pretrained:
    """Loads a DeepSeek model from a Hugging Face folder.

    A process reads only what its own devices keep. On a terminal a bar shows the
    progress.

    Args:
      folder: with config.json and safetensors files.
      mesh: with the axes pp (stages), dp (copies) and ep (experts), or some of them;
        None: the first device alone.
      dtype: of the parameters and of the arithmetic, "float32" or "bfloat16"; None:
        float32, as training needs it. Float8 weights are multiplied by their scales.

    Raises:
      ValueError: the folder is not that of a model that is implemented, a file or a
        tensor is missing, damaged or does not fit, or the model does not fit the mesh.

    Examples:
      >>> pretrained = load_pretrained("tests/data/deepseek_v3_fp8")
      >>> pretrained.config.num_hidden_layers
      2
      >>> pretrained.logits([[17, 4, 42]]).shape
      (1, 3, 96)
    """
    name = jnp.dtype("float32" if dtype is None else dtype).name
    if name not in _DTYPES:
        raise ValueError(f"{dtype=} must be 'float32' or 'bfloat16'.")
    config, source = open_folder(folder)
    whole = complete_mesh(mesh)
    model = build(DeepSeek(architecture=config, compute_dtype=name), whole)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    shardings = jax.tree.map(
        functools.partial(NamedSharding, whole),
        rest_specs(shapes, model.param_specs, whole, shard_at_rest=False),
        is_leaf=lambda node: isinstance(node, P),
    )
    params = read_params(source, model, shardings, name)
    everywhere = NamedSharding(whole, P())
    buffers = jax.jit(model.init_buffers, out_shardings=everywhere)()
    bias = jax.device_put(read_bias(source, model), everywhere)
    buffers = buffers._replace(bias=bias)
    return Pretrained(config, params, buffers, model, whole, source)


def reader_for(
    model: DeepSeekPipeline, folder: str | os.PathLike[str]
) -> Callable[[PipelineParams, RouterState], tuple[PipelineParams, RouterState]]:
    """Opens the folder of a published model for a training run.

    Args:
      model: of the run.
      folder: see `load_pretrained`.

    Returns:
      A function from the parameters and buffers of the run's first state to those with
      the published weights and bias, in the same dtypes and shardings. It gives the
      memory of the parameters back before it reads.

    Raises:
      ValueError: see `load_pretrained`, or the folder has another model.
    """
    published, source = open_folder(folder)
    if model.arch.num_nextn_predict_layers > published.num_nextn_predict_layers:
        raise ValueError(
            f"{folder} has no weights of a multi-token prediction module; set "
            "num_nextn_predict_layers=0."
        )
    check_same(model.arch, published, folder)

    def read(
        params: PipelineParams, buffers: RouterState
    ) -> tuple[PipelineParams, RouterState]:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        for leaf in jax.tree.leaves(params):
            leaf.delete()
        bias = jax.device_put(read_bias(source, model), buffers.bias.sharding)
        params = read_params(source, model, shardings, "float32")
        return params, buffers._replace(bias=bias)

    return read


def check_same(
    config: DeepSeekConfig, published: DeepSeekConfig, folder: str | os.PathLike[str]
) -> None:
    """Checks that a model is the one of a folder.

    Multi-token prediction may be left out, and weights that are read have no
    `initializer_range`.

    Raises:
      ValueError: a field differs.
    """
    for field in dataclasses.fields(config):
        own, other = (getattr(each, field.name) for each in (config, published))
        may_differ = ("num_nextn_predict_layers", "initializer_range")
        if own != other and field.name not in may_differ:
            raise ValueError(
                f"the architecture has {field.name}={own!r}, but {folder} has "
                f"{other!r}; set it to DeepSeekConfig.from_pretrained of that folder."
            )


def open_folder(folder: str | os.PathLike[str]) -> tuple[DeepSeekConfig, Source]:
    """Reads what a folder holds, without weights.

    Raises:
      ValueError: see `load_pretrained`.
    """
    config = DeepSeekConfig.from_pretrained(folder)
    source = Source(folder, read_config(folder))
    if config.num_nextn_predict_layers:
        prefix = layer_prefix(config.num_hidden_layers)
        if not any(name.startswith(prefix) for name in source.names()):
            config = dataclasses.replace(config, num_nextn_predict_layers=0)
    source.check(published_shapes(config), copies(config))
    return config, source
