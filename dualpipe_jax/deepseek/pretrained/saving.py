"""Writes a model as a published folder: weights, their index, and all other files."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dualpipe_jax.deepseek.model import DeepSeekPipeline, RouterState
from dualpipe_jax.deepseek.pretrained.fp8 import quantize, scale_shape
from dualpipe_jax.deepseek.pretrained.names import BIAS, copies, layer_prefix
from dualpipe_jax.deepseek.pretrained.reading import leaf_at, places_of
from dualpipe_jax.deepseek.pretrained.safetensors import DTYPES, write_file
from dualpipe_jax.deepseek.pretrained.source import (
    INDEX_FILE,
    SCALE,
    WEIGHTS_FILE,
    Source,
)
from dualpipe_jax.deepseek.pretrained.target import Target
from dualpipe_jax.executor import PipelineParams
from dualpipe_jax.train import distributed

# As transformers divides weights.
MAX_FILE_BYTES = 5 * 10**9


def save_folder(
    folder: str | os.PathLike[str],
    source: Source | Target,
    model: DeepSeekPipeline,
    params: PipelineParams,
    buffers: RouterState,
    max_file_bytes: int,
) -> None:
    """Writes a folder like the one that was read; all processes call it.

    Args:
      folder: a new one.
      source: what names, dtypes and other files are taken from.
      model: that the parameters are laid out for.
      params: on any mesh.
      buffers: with the router's bias.
      max_file_bytes: of a file of weights; one tensor may be larger.

    Raises:
      ValueError: the folder exists.
    """
    folder = Path(folder)
    # Written under another name first: a folder that is there is whole.
    partial = folder.with_name(f"{folder.name}.partial")
    if folder.exists():
        raise ValueError(f"{folder} exists; save to a new folder.")
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        source.write_others(partial)
    tensors = _Tensors(source, model, params, buffers)
    files = tensors.divided(max_file_bytes)
    places, total = {}, 0
    for number, names in enumerate(files, 1):
        name = WEIGHTS_FILE
        if len(files) > 1:
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
        infos = {
            stored: info for each in names for stored, info in tensors.stored(each)
        }
        arrays = (array for each in names for array in tensors.arrays(each))
        if distributed.is_main():
            write_file(partial / name, infos, arrays)
        else:
            for _ in arrays:  # which other processes have a part of
                pass
        places |= dict.fromkeys(infos, name)
        total += sum(map(_num_bytes, infos.values()))
    if distributed.is_main():
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (partial / INDEX_FILE).write_text(text, encoding="utf-8")
        partial.rename(folder)
    distributed.barrier("save_folder")


def _num_bytes(info: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = info
    return DTYPES[dtype].itemsize * math.prod(shape)


class _Tensors:
    """The tensors to write, by their published names."""

    def __init__(
        self,
        source: Source | Target,
        model: DeepSeekPipeline,
        params: PipelineParams,
        buffers: RouterState,
    ):
        self._source, self._params = source, params
        self._bias = np.asarray(buffers.bias)
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        # One program for each shape of a parameter, whichever entry is taken.
        self._take = jax.jit(
            lambda leaf, at: leaf[at],
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )
        self._copies = copies(model.arch)
        self._places = {}
        for place in places_of(model):
            stages = [None]
            if not isinstance(place.prefixes, str):
                stages = range(len(place.prefixes))
            experts = model.arch.n_routed_experts if place.part.of_experts else 1
            for stage in stages:
                for expert in range(experts):
                    name = place.name(stage, expert)
                    self._places[name] = place, stage, expert
        first = model.arch.first_k_dense_replace
        self._rows = {
            f"{layer_prefix(first + row)}{BIAS}": row for row in range(len(self._bias))
        }

    def divided(self, max_bytes: int) -> list[list[str]]:
        """Returns the names of the tensors of each file, in the source's order."""
        files, room = [], 0
        for name in self._source.names():
            other = self._copies.get(name, name)
            if other not in self._places and other not in self._rows:
                continue  # multi-token prediction, which this model is without
            size = sum(_num_bytes(info) for _, info in self.stored(name))
            if not files or size > room:
                files.append([])
                room = max_bytes
            files[-1].append(name)
            room -= size
        return files

    def stored(self, name: str) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        """Yields name, dtype and shape of what is written of a tensor."""
        dtype, shape = self._source.dtype(name), self._source.shape(name)
        yield name, (dtype, shape)
        if block := self._source.block_of(name):
            yield f"{name}{SCALE}", ("F32", scale_shape(shape, block))

    def arrays(self, name: str) -> Iterator[np.ndarray]:
        """Yields the arrays that `stored` describes."""
        own = self._own(self._copies.get(name, name))
        block = self._source.block_of(name)
        if block is None:
            yield own.astype(DTYPES[self._source.dtype(name)], copy=False)
        else:
            yield from quantize(own, block, self._source.scales(name))

    def _own(self, name: str) -> np.ndarray:
        """Returns a tensor of the model as it is published, in the model's dtype."""
        if name in self._rows:
            return self._bias[self._rows[name]]
        place, stage, expert = self._places[name]
        at = () if stage is None else (np.int32(stage),)
        if place.part.of_experts:
            at = *at, np.int32(expert)
        leaf = leaf_at(self._params, place.path)
        return place.part.published(np.asarray(self._take(leaf, at) if at else leaf))
