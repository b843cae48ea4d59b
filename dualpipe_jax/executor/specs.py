"""How parameters lie on the mesh beside the pipeline's axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from dualpipe_jax.executor.params import PipelineParams

PyTree = Any


def map_specs(
    function: Callable[[tuple, Any], Any],
    specs: PipelineParams,
    params: PipelineParams,
    *,
    axis_name: str,
) -> PipelineParams:
    """Calls a function with the full spec of each parameter, and the parameter.

    Args:
      function: ((entries of the `PartitionSpec`), leaf) -> anything.
      specs: one `PartitionSpec` for each subtree, without the axis of the stages;
        None where replicated.
      params: arrays, or shapes.
      axis_name: the mesh axis of the stages.

    Returns:
      The results, in the structure of `params`.

    Raises:
      ValueError: if the tree of specs is not a prefix of the parameters'.
    """

    def full(name: str, *leading: str) -> PyTree:
        try:
            return jax.tree.map(
                lambda spec, part: jax.tree.map(
                    lambda leaf: function((*leading, *(spec or ())), leaf), part
                ),
                getattr(specs, name),
                getattr(params, name),
                is_leaf=is_spec,
            )
        except ValueError as error:
            raise ValueError(
                f"param_specs.{name} must be a prefix of the tree params.{name}, with "
                f"a PartitionSpec for each array or subtree: {error}"
            ) from error

    return PipelineParams(full("stages", axis_name), full("embed"), full("head"))


def check_specs(specs: Any, mesh: Mesh, axis_name: str):
    """Raises a `ValueError` unless these are `PartitionSpec`s over the other axes."""
    if not isinstance(specs, PipelineParams):
        raise ValueError(
            f"param_specs is a {type(specs).__name__}; pass PipelineParams(stages=..., "
            "embed=..., head=...) of PartitionSpecs, None where replicated."
        )
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec):
        if spec is not None:
            where = f"param_specs{jax.tree_util.keystr(path)}"
            check_spec(where, spec, mesh, axis_name)


def check_spec(where: str, spec: Any, mesh: Mesh, axis_name: str):
    """Raises a `ValueError` unless this is a `PartitionSpec` over the other axes."""
    if not isinstance(spec, PartitionSpec):
        raise ValueError(
            f"{where} is a {type(spec).__name__}, {spec!r}; it must be a "
            "jax.sharding.PartitionSpec, or None where replicated."
        )
    names = list(_axes(spec))
    if axis_name in names:
        raise ValueError(
            f"{where} is {spec}, but {axis_name!r} is the pipeline's axis: the step "
            "divides the axis of the stages over it; leave both out."
        )
    if unknown := [name for name in names if name not in mesh.axis_names]:
        raise ValueError(
            f"{where} is {spec}, but the mesh has no axis {unknown[0]!r}; it has "
            f"{tuple(mesh.axis_names)}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{where} is {spec}; name each mesh axis once.")


def check_specs_fit(specs: PipelineParams, params: PipelineParams, mesh: Mesh):
    """Raises a `ValueError` if full specs, one for each array, cannot divide them."""

    def check(path: tuple, leaf: Any, spec: PartitionSpec):
        where = f"params{jax.tree_util.keystr(path)}"
        what = "its spec in param_specs (which leave out the axis of the stages)"
        check_spec_fits(where, jnp.shape(leaf), spec, what, mesh)

    jax.tree_util.tree_map_with_path(check, params, specs)


def check_spec_fits(
    where: str, shape: tuple[int, ...], spec: PartitionSpec, what: str, mesh: Mesh
):
    """Raises a `ValueError` if the full spec of an array cannot divide it."""
    if len(spec) > len(shape):
        raise ValueError(f"{where} has shape {shape}, too few axes for {spec}, {what}.")
    for size, entry in zip(shape, spec, strict=False):
        parts = math.prod(mesh.shape[name] for name in _names(entry))
        if size % parts:
            raise ValueError(
                f"{where} has shape {shape}, and {spec}, {what}, divides the axis of "
                f"size {size} into {parts} parts; it must be a multiple of that."
            )


def explicit_part(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Returns the part of a spec over the mesh's Explicit axes, for `reshard`.

    Examples:
      >>> types = AxisType.Auto, AxisType.Explicit
      >>> mesh = jax.sharding.AbstractMesh((2, 2), ("pp", "dp"), axis_types=types)
      >>> tuple(explicit_part(PartitionSpec("pp", "dp", ("pp", "dp")), mesh))
      (None, 'dp', 'dp')
    """
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    entries = []
    for entry in spec:
        kept = tuple(n for n in _names(entry) if types[n] == AxisType.Explicit)
        entries.append(kept[0] if len(kept) == 1 else kept or None)
    return PartitionSpec(*entries)


def is_spec(node: Any) -> bool:
    """Whether a node of a tree of specs is one of them."""
    return node is None or isinstance(node, PartitionSpec)


def _axes(spec: PartitionSpec) -> Iterator[Any]:
    for entry in spec:
        yield from _names(entry)


def _names(entry: Any) -> tuple:
    """Returns the mesh axes of one entry of a spec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
