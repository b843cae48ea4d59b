"""The public functions that run a schedule: one jitted step, or its forward alone.

References: DeepSeek-V3 Technical Report, section 3.2.1 (DualPipe).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dualpipe_jax.executor import checks as _checks
from dualpipe_jax.executor.footprint import (
    BufferBytes,
    buffers_of,
    lower_costliest_task,
)
from dualpipe_jax.executor.jitted import Jitted
from dualpipe_jax.executor.losses import Weighted
from dualpipe_jax.executor.model import Model
from dualpipe_jax.executor.no_transpose import refuse_transpose
from dualpipe_jax.executor.params import (
    PipelineAux,
    PipelineParams,
    microbatch_key,
    stack_stages,
)
from dualpipe_jax.executor.side import side_specs
from dualpipe_jax.executor.specs import check_specs
from dualpipe_jax.lowering import lower
from dualpipe_jax.schedules import Schedule

__all__ = [
    "BufferBytes",
    "PipelineAux",
    "PipelineForward",
    "PipelineParams",
    "PipelineStep",
    "Weighted",
    "microbatch_key",
    "pipeline_forward",
    "pipeline_value_and_grad",
    "stack_stages",
]

PyTree = Any


class PipelineStep(Jitted):
    """The step that `pipeline_value_and_grad` returns.

    Called as `step(params, inputs, targets, key=None, side=None)`, it returns
    `(losses, aux), grads`. It compiles on the first call, as a `jax.jit` function does;
    `step.lower(params, inputs, targets).compile()` compiles it for arguments of given
    shapes. It has forward-mode derivatives (`jax.jvp`), so products with the Hessian;
    `jax.grad` through it raises a `ValueError`. To export it, pass `disabled_checks=[
    jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]` to `jax.export`,
    since the layout of its buffers is fixed.

    - params: `PipelineParams`; leaves of `stages` are [num_stages, ...].
    - inputs, targets: pytrees, leaves [num_microbatches, microbatch, ...].
    - key: if given, each call of a function with a parameter `key` gets its own (see
      `microbatch_key`; folded with the position along `data_axes`).
    - side: what every stage reads beside its input, leaves [num_microbatches, ...], if
      the step was made for it.
    - losses: [num_microbatches] float32. Their mean is the step's loss, also where
      `loss_fn` returns `Weighted` sums: then each is the microbatch's total over the
      mean weight of a microbatch.
    - aux: the auxiliary outputs of `stage_fn` (leaves [num_stages, ...]) or of
      `loss_fn`, reduced; a `PipelineAux` if both return some, None if neither does.
    - grads: of the step's loss, like params; None in place of parameters that are not
      trained. With `input_grads`, the pair of these and the gradients of the inputs:
      like inputs, None in place of integers.
    """

    def __init__(self, model: Model):
        def step(params, inputs, targets, key=None, *, side=None):
            out = model.call(params, inputs, targets, key, side)
            grads = (out.grads, out.input_grads) if model.input_grads else out.grads
            return refuse_transpose(
                ((out.outputs, out.aux), grads),
                "The step cannot be differentiated in reverse mode: it returns "
                "gradients itself, `(losses, aux), grads = step(params, inputs, "
                "targets)`. Put what follows the losses into loss_fn.",
            )

        super().__init__(step)
        self._model = model

    def buffers(self, params, inputs, targets, key=None, *, side=None) -> BufferBytes:
        """Returns the bytes that the step keeps on one device from tick to tick."""
        return buffers_of(self._model, params, inputs, targets, key, side)

    def lower_costliest_task(
        self, params, inputs, targets, key=None, *, side=None
    ) -> jax.stages.Lowered:
        """Lowers only the task that needs the most memory, with the step's buffers.

        That is an overlapped pair where the program has one, else a backward. It
        updates the buffers in place, so that the temporaries of the compiled task are
        its working set.
        """
        return lower_costliest_task(self._model, params, inputs, targets, key, side)


class PipelineForward(Jitted):
    """The function that `pipeline_forward` returns.

    Called as `forward(params, inputs, key=None, side=None)`, it returns the last
    stage's outputs, leaves [num_microbatches, microbatch, ...]. It compiles on the
    first call; `forward.lower(params, inputs).compile()` compiles it for arguments of
    given shapes.

    - params: `PipelineParams`; leaves of `stages` are [num_stages, ...].
    - inputs: a pytree, leaves [num_microbatches, microbatch, ...].
    - key, side: as for `PipelineStep`.
    """

    def __init__(self, model: Model):
        def forward(params, inputs, key=None, *, side=None):
            return refuse_transpose(
                model.call(params, inputs, (), key, side).outputs,
                "pipeline_forward keeps no residuals, so it cannot be differentiated "
                "in reverse mode; use pipeline_value_and_grad.",
            )

        super().__init__(forward)


def pipeline_value_and_grad(
    stage_fn: Callable[..., PyTree] | Sequence[Callable[..., PyTree]],
    loss_fn: Callable[..., Any],
    *,
    schedule: Schedule,
    mesh: Mesh,
    axis_name: str = "pp",
    embed_fn: Callable[..., PyTree] | None = None,
    data_axes: Sequence[str] = (),
    param_specs: PipelineParams | None = None,
    tied: bool = False,
    aux_reduction: str = "sum",
    accumulate_dtype: Any = jnp.float32,
    overlap: bool | None = None,
    side: PyTree = None,
    trainable: Any = None,
    input_grads: bool = False,
) -> PipelineStep:
    """Makes a function that computes a pipelined model's losses and gradients.

    The functions see one microbatch, and run inside `jax.shard_map` over all axes of
    the mesh: they may use collectives over every axis but `axis_name`. The step's loss
    is the mean over the devices along these other axes.

    Args:
      stage_fn: `stage_fn(stage_params, x) -> y` or `(y, aux)`; x and y are pytrees of
        floating arrays of the same shapes and dtypes. May be `jax.checkpoint`ed. Or one
        function per stage, all with one parameter structure: equal ones (`==`) share
        code, and collectives in them can be hidden, unlike in a `lax.cond`.
      loss_fn: `loss_fn(head_params, y, targets) -> loss` or `(loss, aux)`; the loss is
        a scalar, or a `Weighted` sum where microbatches or devices hold unequal numbers
        of valid tokens.
      schedule: the schedule of tasks over ranks.
      mesh: mesh with the axis `axis_name`, of size `schedule.num_ranks`.
      axis_name: the pipeline axis.
      embed_fn: `embed_fn(embed_params, inputs) -> x`; by default x is the input.
      data_axes: mesh axes that split axis 1 of inputs and targets.
      param_specs: `PartitionSpec`s (a prefix of the parameters' tree) over axes other
        than `axis_name`, without the stage axis; by default parameters are
        replicated over them. A function sees its own shard.
      tied: `loss_fn` gets `(embed_params, head_params)` as its first argument, and
        the gradients of both uses of the embedding are summed in `grads.embed`.
      aux_reduction: `"sum"`, `"mean"` or `"stack"` of aux over microbatches (and sum,
        mean or mean over `data_axes`); what is summed is at least int32 or float32.
      accumulate_dtype: gradients are summed over microbatches in this dtype, or in
        the parameter's own if that is wider, and returned in it.
      overlap: whether F and B of a pair compile into one body, in which each can hide
        the communication of the other. False compiles a smaller program: a pair runs
        as F, then B, and a split backward runs whole at its I. By default False on the
        CPU devices of one process, where nothing can be hidden; otherwise True.
      side: for a `stage_fn(stage_params, x, side)` that reads positions, masks or
        segment ids: `PartitionSpec`s (a prefix of their tree) of the whole arrays
        [num_microbatches, ...], such as `P()`, or `P(None, "dp")` where axis 1 is
        divided. Each stage gets the row of its microbatch, of any dtype; side inputs
        have no gradients, and are neither kept for the backward nor sent.
      trainable: which parameters get gradients, by default all: a bool; a prefix of
        bools of the stages' tree; an NNX filter such as `nnx.LoRAParam`, for stages,
        embedding and head; or `PipelineParams` of these, None where all are trained.
        Nothing is computed or kept for the gradients of others.
      input_grads: whether gradients of the inputs are returned, too.

    Returns:
      `step(params, inputs, targets, key=None, side=None) -> (losses, aux), grads`; see
      `PipelineStep`.

    Raises:
      ValueError: before anything is compiled, if the schedule does not fit the mesh, a
        parameter leaf lacks the stage axis, a stage changes the shape of its input,
        activations are not floating, the loss is not a scalar, `trainable` does not
        fit the parameters, and the like.

    Examples:
      >>> from dualpipe_jax import one_f_one_b
      >>> params = PipelineParams(stages={"w": jnp.ones((2, 4, 4))})
      >>> step = pipeline_value_and_grad(
      ...     lambda stage, x: jnp.tanh(x @ stage["w"]),
      ...     lambda head, y, target: jnp.mean((y - target) ** 2),
      ...     schedule=one_f_one_b(num_ranks=2, num_microbatches=3),
      ...     mesh=jax.make_mesh((2,), ("pp",), devices=jax.devices()[:2]),
      ... )
      >>> x = jnp.ones((3, 8, 4))
      >>> (losses, aux), grads = step(params, x, jnp.zeros_like(x))
      >>> losses.shape, grads.stages["w"].shape
      ((3,), (2, 4, 4))
    """
    accumulate_dtype = jnp.dtype(accumulate_dtype)
    arguments = locals()  # fields of `Model` have their names
    _checks.check_training(schedule, aux_reduction)
    return PipelineStep(_make_model(**arguments))


def pipeline_forward(
    stage_fn: Callable[..., PyTree] | Sequence[Callable[..., PyTree]],
    *,
    schedule: Schedule,
    mesh: Mesh,
    axis_name: str = "pp",
    embed_fn: Callable[..., PyTree] | None = None,
    data_axes: Sequence[str] = (),
    param_specs: PipelineParams | None = None,
    overlap: bool | None = None,
    side: PyTree = None,
) -> PipelineForward:
    """Makes a function that runs only the forward pass, and keeps no residuals.

    Args:
      stage_fn: as in `pipeline_value_and_grad`; auxiliary outputs are dropped.
      schedule: only its F tasks run, in its order.
      mesh: mesh with the axis `axis_name`, of size `schedule.num_ranks`.
      axis_name: the pipeline axis.
      embed_fn: `embed_fn(embed_params, inputs) -> x`; by default x is the input.
      data_axes: mesh axes that split axis 1 of inputs and of outputs.
      param_specs: as in `pipeline_value_and_grad`.
      overlap: as in `pipeline_value_and_grad`; here it affects steady states only.
      side: as in `pipeline_value_and_grad`.

    Returns:
      `forward(params, inputs, key=None, side=None) -> outputs`: the last stage's
      outputs, leaves [num_microbatches, microbatch, ...]; see `PipelineForward`.

    Raises:
      ValueError: as for `pipeline_value_and_grad`.

    Examples:
      >>> from dualpipe_jax import gpipe
      >>> forward = pipeline_forward(
      ...     lambda stage, x: x + stage,
      ...     schedule=gpipe(num_ranks=2, num_microbatches=3),
      ...     mesh=jax.make_mesh((2,), ("pp",), devices=jax.devices()[:2]),
      ... )
      >>> print(forward(PipelineParams(jnp.array([1.0, 10.0])), jnp.arange(3.0)))
      [11. 12. 13.]
    """
    arguments = locals() | {"schedule": schedule.forward_only(), "loss_fn": None}
    return PipelineForward(_make_model(**arguments))


def _make_model(
    *, schedule: Schedule, mesh: Mesh, axis_name: str, stage_fn, side, **options
) -> Model:
    """Checks the arguments common to both functions, and lowers the schedule."""
    data_axes, param_specs = options.pop("data_axes"), options.pop("param_specs")
    _checks.check_mesh(schedule, mesh, axis_name, data_axes)
    _checks.check_stage_fns(stage_fn, schedule)
    if param_specs is None:
        param_specs = PipelineParams()
    check_specs(param_specs, mesh, axis_name)
    return Model(
        stage_fn=stage_fn,
        program=lower(schedule),
        mesh=mesh,
        axis_name=axis_name,
        data_axes=tuple(data_axes),
        param_specs=param_specs,
        side=side_specs(side, mesh, axis_name),
        **options,
    )
