"""From a training run's checkpoint to a published folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualpipe_jax.deepseek.model import (
    DeepSeek,
    DeepSeekConfig,
    RopeScaling,
    RouterState,
    restore_run,
)
from dualpipe_jax.deepseek.pretrained.pretrained import check_same, open_folder
from dualpipe_jax.deepseek.pretrained.saving import MAX_FILE_BYTES, save_folder
from dualpipe_jax.deepseek.pretrained.target import Target
from dualpipe_jax.tokens import has_tokenizer
from dualpipe_jax.train import TOKENIZER


def export_run(
    run: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    fp8: bool = False,
    say: Callable[[str], Any] = print,
) -> None:
    """Writes the latest checkpoint of a training run as a Hugging Face folder.

    Args:
      run: the run's folder.
      folder: a new one.
      like: a published model that names, dtypes and all other files, such as the
        tokenizer's, are taken from; None: the one that the run began with, if any, else
        the tokenizer is that of the run's data.
      dtype: of the weights, without such a model: "bfloat16" or "float32".
      fp8: without such a model, whether the matrices of the layers are written in
        float8, in DeepSeek's layout.
      say: called with a line of text for each damaged checkpoint.

    Raises:
      ValueError: there is no checkpoint that can be read, `like` is another model, or
        `folder` exists.
    """
    here = Mesh(np.array(jax.local_devices()[:1]), ("ep",))
    whole = NamedSharding(here, PartitionSpec())
    model, state = restore_run(
        run,
        lambda info: _model_of(info).build_unpipelined().from_checkpoint_info(info),
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        say,
    )
    config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    like = config.get("pretrained") if like is None else like
    if like is None:
        own = Path(run) / TOKENIZER
        target = Target(
            model.arch,
            dtype,
            config["sequence_length"],
            fp8=fp8,
            tokenizer=own if has_tokenizer(own) else None,
        )
    else:
        published, target = open_folder(like)
        check_same(model.arch, published, like)
    buffers = RouterState(**state["buffers"])
    save_folder(folder, target, model, state["params"], buffers, MAX_FILE_BYTES)


def _model_of(info: dict[str, Any]) -> DeepSeek:
    """Returns the model of a checkpoint, as it says itself."""
    known = {field.name for field in dataclasses.fields(DeepSeekConfig)}
    fields = dict(info.get("architecture", {}))
    if not fields or fields.keys() - known:
        raise ValueError(
            "the checkpoint is of another kind of model, or of another version of "
            "dualpipe_jax; export with the version that wrote it."
        )
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return DeepSeek(architecture=DeepSeekConfig(**fields))
