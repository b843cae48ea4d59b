"""Checks the pipeline's arguments before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax.executor.losses import take_apart
from dualpipe_jax.executor.params import PipelineParams
from dualpipe_jax.executor.trees import describe, difference
from dualpipe_jax.schedules import Schedule

PyTree = Any
REDUCTIONS = ("sum", "mean", "stack")


def check_mesh(schedule: Schedule, mesh, axis_name: str, data_axes: Sequence[str]):
    """Raises a `ValueError` if the schedule does not fit the mesh."""
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"{axis_name=} is not an axis of the mesh {tuple(mesh.axis_names)}; name "
            "its pipeline axis, or make the mesh with one."
        )
    size = mesh.shape[axis_name]
    if size != schedule.num_ranks:
        raise ValueError(
            f"{schedule.num_ranks=} must equal the size of mesh axis {axis_name!r}, "
            f"{size}; make the schedule with num_ranks={size}."
        )
    if schedule.num_stages % schedule.num_ranks:
        raise ValueError(
            f"{schedule.num_stages=} must be a multiple of {schedule.num_ranks=}, so "
            "that the stage axis of the parameters can be split over the ranks."
        )
    if isinstance(data_axes, str):
        raise ValueError(f"{data_axes=} must be a tuple of names: ({data_axes!r},).")
    for axis in data_axes:
        if axis not in mesh.axis_names or axis == axis_name:
            raise ValueError(
                f"{data_axes=} must name mesh axes other than {axis_name!r}; the mesh "
                f"has {tuple(mesh.axis_names)}."
            )
    if len(set(data_axes)) < len(data_axes):
        raise ValueError(f"{data_axes=} must name each mesh axis once.")


def check_training(schedule: Schedule, aux_reduction: str):
    """Raises a `ValueError` without backward tasks, or for an unknown reduction."""
    if schedule.is_forward_only:
        raise ValueError(
            f"{schedule.kind=} has no backward tasks; use pipeline_forward, or a "
            "training schedule."
        )
    if aux_reduction not in REDUCTIONS:
        raise ValueError(f"{aux_reduction=} must be one of {REDUCTIONS}.")


def check_params(params, schedule: Schedule):
    """Raises a `ValueError` if a leaf has no gradient, or lacks the stage axis."""
    if not isinstance(params, PipelineParams):
        raise ValueError(
            f"params is a {type(params).__name__}; wrap it: PipelineParams(stages=...)."
        )
    if not jax.tree.leaves(params.stages):
        raise ValueError("params.stages holds no arrays; pass the stages' parameters.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where, dtype = f"params{jax.tree_util.keystr(path)}", jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{where} is a {dtype} array; keep random state out of the parameters "
                "(nnx.split(module, nnx.Param, ...)) and pass key= to the step."
            )
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            raise ValueError(
                f"{where} is a {dtype} array, whose gradients do not add up as the "
                "step adds those of microbatches; convert it to float32, or keep it "
                "out of the parameters."
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params.stages):
        shape = jnp.shape(leaf)
        if not shape or shape[0] != schedule.num_stages:
            raise ValueError(
                f"params.stages{jax.tree_util.keystr(path)} has shape {shape}; its "
                f"first axis must be the stage axis, {schedule.num_stages=}: stack the "
                "stages with stack_stages."
            )


def check_microbatches(
    where: str, shape: tuple[int, ...], schedule: Schedule, remedy: str
):
    """Raises a `ValueError` if an array's first axis is not that of microbatches."""
    if not shape or shape[0] != schedule.num_microbatches:
        raise ValueError(
            f"{where} has shape {shape}; its first axis must be "
            f"{schedule.num_microbatches=}: {remedy}"
        )


def check_batch(inputs, targets, schedule: Schedule, mesh, data_axes):
    """Raises a `ValueError` if the leading axes of inputs or targets do not fit."""
    split = 1
    for axis in data_axes:
        split *= mesh.shape[axis]
    for name, tree in (("inputs", inputs), ("targets", targets)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            shape = jnp.shape(leaf)
            where = f"{name}{jax.tree_util.keystr(path)}"
            check_microbatches(
                where,
                shape,
                schedule,
                "reshape the batch to [num_microbatches, microbatch, ...].",
            )
            if data_axes and (len(shape) < 2 or shape[1] % split):
                raise ValueError(
                    f"{where} has shape {shape}; its second axis must be a multiple of "
                    f"{split}, the size of {tuple(data_axes)=} together."
                )


def check_activations(x: PyTree, embed_fn: Callable | None):
    """Raises a `ValueError` if a stage's input is not floating."""
    source = "inputs" if embed_fn is None else "the output of embed_fn"
    leaves = jax.tree_util.tree_leaves_with_path(x)
    if not leaves:
        raise ValueError(f"{source} holds no arrays; a stage needs activations.")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{source}{jax.tree_util.keystr(path)} has dtype {leaf.dtype}; "
                "activations must be floating, to carry gradients: pass embed_fn to "
                "turn tokens into activations."
            )


def check_stage_fns(stage_fn: Any, schedule: Schedule):
    """Raises a `ValueError` unless there is one function, or one per stage."""
    if callable(stage_fn):
        return
    if len(stage_fn) != schedule.num_stages:
        raise ValueError(
            f"stage_fn has {len(stage_fn)} functions, but {schedule.num_stages=}; pass "
            "one for each stage, or one for all."
        )


def check_same_aux(auxes: Sequence[PyTree]):
    """Raises a `ValueError` if the stages return different auxiliary outputs."""
    first, *rest = auxes
    for other in rest:
        if differs := difference(other, first):
            raise ValueError(
                f"stage_fn: one stage's function returns the aux {describe(first)}, "
                f"another's {describe(other)} ({differs}); all must return the same, "
                "zeros where a stage has nothing."
            )


def check_stage(out: PyTree, x: PyTree) -> tuple[bool, PyTree]:
    """Returns whether the stage with output `out` also returns aux, and which."""
    if difference(out, x) is None:
        return False, None
    is_pair = isinstance(out, tuple) and len(out) == 2
    differs = difference(out[0] if is_pair else out, x)
    if is_pair and differs is None:
        return True, out[1]
    raise ValueError(
        f"stage_fn turns {describe(x)} into {describe(out)}; a stage must return what "
        f"it takes, in structure, shape and dtype, or (that, aux), but {differs}. Put "
        "what differs into embed_fn or loss_fn."
    )


def check_loss(out: Any) -> PyTree:
    """Checks the shapes of the loss; returns those of its auxiliary outputs."""
    loss, weight, aux = take_apart(out)
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape:
        raise ValueError(
            f"loss_fn returns {describe(loss)}; it must return a scalar, or (scalar, "
            "aux): take the mean over the microbatch, or Weighted(total, weight)."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"loss_fn returns a {loss.dtype} scalar; it must be floating.")
    if weight is not None and (
        not isinstance(weight, jax.ShapeDtypeStruct)
        or weight.shape
        or not isinstance(weight.dtype, np.dtype)
        or jnp.issubdtype(weight.dtype, jnp.complexfloating)
    ):
        raise ValueError(
            f"loss_fn returns Weighted(weight={describe(weight)}); weight must be a "
            "scalar, a number or a bool: sum it over the microbatch."
        )
    return aux


def check_aux(aux: PyTree, function: str):
    """Raises a `ValueError` if an auxiliary output cannot be reduced."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(
                f"{function} returns a {leaf.dtype} array as aux"
                f"{jax.tree_util.keystr(path)}, which cannot be summed or stacked; "
                "leave it out, or return jax.random.key_data(key) of a key."
            )
