"""Reads a model's parameters from a published folder, each device its part.

Every array is made from its parts on the devices (`jax.make_array_from_callback`), so a
process reads, and holds, only what its own devices keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dualpipe_jax.deepseek.model import DeepSeekPipeline
from dualpipe_jax.deepseek.pretrained.names import (
    BIAS,
    Index,
    Part,
    embed_part,
    head_parts,
    layer_parts,
    layer_prefix,
    mtp_parts,
)
from dualpipe_jax.deepseek.pretrained.source import Source
from dualpipe_jax.executor import PipelineParams

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter of a model, and the tensors that its parts are.

    Attributes:
      path: keys to it in `PipelineParams`, with the number of a layer position.
      part: how its axes are arranged in a tensor.
      prefixes: what the names of the tensors begin with: one for each entry of the
        leading axis of stages, None where a stage has none; a single text for a
        parameter without that axis.
    """

    path: tuple[Any, ...]
    part: Part
    prefixes: tuple[str | None, ...] | str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an entry, with the axis of experts if there is one."""
        return self.part.own_shape

    def name(self, stage: int | None, expert: int) -> str | None:
        """Returns the tensor of an entry; None: there is none."""
        prefix = self.prefixes if stage is None else self.prefixes[stage]
        return None if prefix is None else f"{prefix}{self.part.name}".format(expert)


def places_of(model: DeepSeekPipeline) -> Iterator[Place]:
    """Yields all parameters of a model, in the order of its stages' positions."""
    arch, layout = model.arch, model.layout
    yield Place(("embed",), embed_part(arch), "")
    for position in range(layout.num_layer_positions):
        layers = layout.layer_GP[:, position].tolist()
        parts = {part: part for kind in (True, False) for part in _parts(arch, kind)}
        for part in parts:
            prefixes = tuple(
                layer_prefix(layer)
                if layer >= 0 and part in _parts(arch, arch.is_dense(layer))
                else None
                for layer in layers
            )
            if any(prefixes):
                yield Place(("stages", position, *part.path), part, prefixes)
    for part in head_parts(arch):
        yield Place(("head", *part.path), part, "")
    if arch.num_nextn_predict_layers:
        prefix = layer_prefix(arch.num_hidden_layers)
        for part in mtp_parts(arch):
            yield Place(("head", "mtp", *part.path), part, prefix)
        for part in layer_parts(arch, is_dense=False):
            yield Place(("head", "mtp", "layer", *part.path), part, prefix)


def _parts(arch: Any, is_dense: bool) -> tuple[Part, ...]:
    return tuple(layer_parts(arch, is_dense=is_dense))


def leaf_at(tree: PyTree, path: tuple[Any, ...]) -> Any:
    """Returns the leaf of parameters at a path."""
    tree = getattr(tree, path[0])
    for key in path[1:]:
        tree = tree[key]
    return tree


def read_params(
    source: Source,
    model: DeepSeekPipeline,
    shardings: PipelineParams,
    dtype: Any,
    console: Console | None = None,
) -> PipelineParams:
    """Reads the parameters of a model.

    Args:
      source: a folder that has been checked.
      model: laid over the stages of a schedule.
      shardings: where each parameter goes.
      dtype: of the parameters; the routers' are float32.
      console: where to show the progress, if it is a terminal; None: stderr.
    """
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    places = {place.path: place for place in places_of(model)}
    console = console or Console(stderr=True)
    columns = TextColumn("reading"), BarColumn(), MofNCompleteColumn()
    columns = *columns, TextColumn("parameters")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(places))

        def read(path: Any, leaf: jax.ShapeDtypeStruct, sharding: Any) -> Any:
            place = places[_keys(path)]
            own = np.dtype(jnp.float32 if "router" in place.path else dtype)
            read = _reader(source, place, own, leaf)
            bar.advance(task)
            return jax.make_array_from_callback(leaf.shape, sharding, read)

        return jax.tree_util.tree_map_with_path(read, abstract, shardings)


def read_bias(source: Source, model: DeepSeekPipeline) -> np.ndarray:
    """Returns the router's bias [MoE layers, experts] float32, zeros without one."""
    arch, num_layers = model.arch, model.balancer.num_layers
    bias_LE = np.zeros((num_layers, arch.n_routed_experts), np.float32)
    if arch.has_router_bias:
        whole = slice(0, arch.n_routed_experts)
        for row in range(num_layers):
            name = layer_prefix(arch.first_k_dense_replace + row) + BIAS
            bias_LE[row] = source.read(name, whole, whole, np.dtype(np.float32))
    return bias_LE


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the keys of a path in a pytree."""
    return tuple(
        getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", None)))
        for entry in path
    )


def _reader(
    source: Source, place: Place, dtype: np.dtype, leaf: jax.ShapeDtypeStruct
) -> Callable[[Any], np.ndarray]:
    """Returns the callback that reads a part of a parameter."""
    done: dict[Any, np.ndarray] = {}  # several devices may hold the same part

    def read(index: Any) -> np.ndarray:
        bounds = tuple(
            slice(*each.indices(size)[:2])
            for each, size in zip(index, leaf.shape, strict=True)
        )
        key = tuple((each.start, each.stop) for each in bounds)
        if key not in done:
            done[key] = _read_part(source, place, dtype, bounds)
        return done[key]

    return read


def _read_part(
    source: Source, place: Place, dtype: np.dtype, bounds: Index
) -> np.ndarray:
    """Reads a part of a parameter: for each stage and expert from another tensor."""
    sizes = [each.stop - each.start for each in bounds]
    result = np.zeros(sizes, dtype)  # padding is zeros
    num_leading = len(sizes) - len(place.shape)
    inner = bounds[num_leading:]
    rows, columns = place.part.where(inner)
    for at in np.ndindex(*sizes[:num_leading]):
        first = [each.start + i for each, i in zip(bounds, at, strict=False)]
        stage = None if isinstance(place.prefixes, str) else first.pop(0)
        name = place.name(stage, first[0] if first else 0)
        if name is not None:
            published = source.read(name, rows, columns, dtype)
            result[at] = place.part.ours(published, inner)
    return result
