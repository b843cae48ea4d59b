"""Checkpoints of a run, written by orbax while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run's folder; a context manager that waits for writes.

    Args:
      folder: where they lie; made when the first one is written.
      max_to_keep: older ones are deleted.
    """

    def __init__(self, folder: Path, max_to_keep: int = 2):
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts to write `state`, unless that step is written already."""
        if step != self.latest_step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, abstract_state: Any) -> Any:
        """Reads the latest checkpoint into the shapes and shardings given.

        Raises:
          ValueError: there is none, or its arrays have other names or shapes.
        """
        step = self.latest_step
        if step is None:
            raise ValueError(
                f"no checkpoint in {self.folder}; start a run there without --resume."
            )
        # orbax would cut or pad an array to the shape asked for.
        saved = self._manager.item_metadata(step)
        names = [_shapes(tree) for tree in (saved, abstract_state)]
        if names[0] != names[1]:
            differing = sorted(set(names[0].items()) ^ set(names[1].items()))
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} is of another model "
                f"or optimizer (first difference: {differing[0][0]}); resume with the "
                "config that wrote it."
            )
        return self._manager.restore(
            step, args=ocp.args.StandardRestore(abstract_state)
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
