"""Reads the weights of a training run's checkpoint, without the optimizer's state."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dualpipe_jax.deepseek.model.pipeline import DeepSeekPipeline
from dualpipe_jax.train import Checkpoints


def restore_run(
    folder: str | os.PathLike[str],
    model_of: Callable[[dict[str, Any]], DeepSeekPipeline],
    place: Callable[[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct],
    say: Callable[[str], Any],
) -> tuple[DeepSeekPipeline, dict[str, Any]]:
    """Reads the latest checkpoint of a run.

    Args:
      folder: the run's.
      model_of: from a checkpoint's info, the model in the layout of the checkpoint.
      place: adds a sharding to the shape of an array.
      say: called with a line of text for each damaged checkpoint.

    Returns:
      The model, and a dict of `params` and `buffers`, which is a dict, too.

    Raises:
      ValueError: there is no checkpoint, or none can be read.
    """
    found = []

    def plan(info: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
        model = model_of(info)
        found.append(model)
        shapes = jax.eval_shape(
            lambda: {
                "params": model.init(jax.random.key(0)),
                "buffers": model.init_buffers()._asdict(),
            }
        )
        return jax.tree.map(place, shapes), lambda x: x

    checkpoints = Path(folder) / "checkpoints"
    if not checkpoints.is_dir():
        raise ValueError(f"no checkpoint in {folder}; train a model there first.")
    with Checkpoints(checkpoints, say) as opened:
        _, state, _ = opened.restore(plan, partial=True)
    return found[-1], state
