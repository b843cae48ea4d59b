"""Turns the user's functions into the work of a tick, for one microbatch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dualpipe_jax import compat
from dualpipe_jax.backward import SplitBackward
from dualpipe_jax.executor import checks as _checks
from dualpipe_jax.executor.collectives import check_axis_is_free
from dualpipe_jax.executor.functions import INDEX, Functions, Traced, TracedStage
from dualpipe_jax.executor.in_place import read
from dualpipe_jax.executor.losses import output_struct
from dualpipe_jax.executor.params import PipelineParams
from dualpipe_jax.executor.trainable import select

PyTree = Any


def _never(*args):
    raise NotImplementedError("A forward-only program has no backward task.")


class StageWork(NamedTuple):
    """The functions that ticks call for one variant: the stages of one `stage_fn`.

    Each takes and returns values of one microbatch; `stage` is a traced scalar.
    Variants share the buffers: `residuals` and `wgrad_residuals` say which arrays of
    `State.residuals` and of `State.wgrad_residuals` hold what this variant keeps.
    """

    forward: Callable[..., tuple]  # params, x, stage, microbatch -> y, aux, residuals
    # Not in a forward-only program, and with the microbatch as last argument:
    backward: Callable[..., tuple] = _never  # params, residuals, dy -> grads, dx
    backward_input: Callable[..., tuple] = _never  # the same -> dx, wgrad_residuals
    backward_weights: Callable[..., PyTree] = _never  # .., wgrad_residuals -> grads
    residuals: tuple[int, ...] = ()
    wgrad_residuals: tuple[int, ...] = ()


class Work(NamedTuple):
    """The functions that ticks call; the executor knows nothing else of the model."""

    stages: tuple[StageWork, ...]  # one per variant
    embed: Callable[[jax.Array], PyTree]  # microbatch -> x
    finish: Callable[..., tuple]  # y, microbatch -> output, aux, head & embed grads, dy
    # Not in a forward-only program:
    # (variant, arguments of its forward), (variant, those of its backward) -> results.
    pair: Callable[..., tuple] = _never
    # dx, microbatch -> grads, gradients of the inputs
    embed_backward: Callable[..., tuple] | None = None


class BufferShapes(NamedTuple):
    """Shapes of one slot of each buffer, and of the auxiliary outputs.

    Residuals and wgrad_residuals can hold the values of any variant.
    """

    activation: PyTree
    residuals: PyTree
    wgrad_residuals: PyTree
    output: PyTree
    stage_aux: PyTree
    loss_aux: PyTree


def forward_work(
    functions: Functions, params: PipelineParams, chunk: PyTree, inputs, targets
) -> tuple[Work, BufferShapes]:
    """Returns the work of a forward-only program; outputs are the last stage's."""
    del targets
    traced = functions.trace_forward(params, chunk, inputs)

    def work_of(stage: TracedStage) -> StageWork:
        def forward(p, x, number, microbatch):
            weights = functions.with_side(p, microbatch)
            y, _ = stage.run(weights, x, functions.key_of(number, microbatch))
            return y, None, ()

        return StageWork(forward)

    work = Work(
        stages=tuple(map(work_of, traced.stages)),
        embed=traced.embed,
        finish=lambda y, microbatch: (y, None, None, None, None),
    )
    return work, BufferShapes(traced.x, (), (), traced.x, None, None)


def training_work(
    functions: Functions, params: PipelineParams, chunk: PyTree, inputs, targets
) -> tuple[Work, BufferShapes]:
    """Returns the work of a training program: whole and split backwards, and loss."""
    traced = functions.trace_forward(params, chunk, inputs)
    plans = [_plan_of(functions, traced, stage) for stage in traced.stages]
    residuals, residual_places = _share([plan.residuals for plan in plans])
    wgrad_residuals, wgrad_places = _share([plan.wgrad_residuals for plan in plans])
    x, row = traced.x, jax.eval_shape(read, targets, INDEX)
    _, loss = functions.trace("loss_fn", functions.call_loss, params, x, row, INDEX)
    loss_aux = _checks.check_loss(loss)
    _checks.check_aux(loss_aux, "loss_fn")

    def inputs_of(x, number, microbatch):
        return x, functions.key_of(number, microbatch)

    def trained(grads):
        return select(grads[0], functions.trained.stages)

    def work_of(plan: SplitBackward, residuals, wgrad_residuals) -> StageWork:
        def forward(p, x, number, microbatch):
            (y, aux), kept = plan.forward(
                functions.with_side(p, microbatch), *inputs_of(x, number, microbatch)
            )
            return y, aux, kept

        def backward(p, residuals, dy, microbatch):
            weights = functions.with_side(p, microbatch)
            grads, cotangents = plan.backward(weights, residuals, dy)
            return trained(grads), cotangents[0]

        def backward_input(p, residuals, dy, microbatch):
            weights = functions.with_side(p, microbatch)
            cotangents, wgrad_residuals = plan.backward_input(weights, residuals, dy)
            return cotangents[0], wgrad_residuals

        def backward_weights(p, residuals, wgrad_residuals, microbatch):
            weights = functions.with_side(p, microbatch)
            return trained(plan.backward_weights(weights, residuals, wgrad_residuals))

        return StageWork(
            forward,
            backward,
            backward_input,
            backward_weights,
            residuals,
            wgrad_residuals,
        )

    def pair(forward, backward):
        f, (p, x, number, microbatch) = forward
        b, (q, residuals, dy, other) = backward
        ((y, aux), kept), (grads, cotangents) = plans[f].forward_and_backward(
            (functions.with_side(p, microbatch), *inputs_of(x, number, microbatch)),
            (functions.with_side(q, other), residuals, dy),
            plans[b],
        )
        return (y, aux, kept), (trained(grads), cotangents[0])

    def finish(y, microbatch):
        return functions.loss(params, y, read(targets, microbatch), microbatch)

    work = Work(
        stages=tuple(map(work_of, plans, residual_places, wgrad_places)),
        embed=traced.embed,
        finish=functions.trace("loss_fn", finish, x, INDEX)[0],
        pair=pair,
        embed_backward=functions.embed_backward(params.embed, inputs, x),
    )
    return work, BufferShapes(
        x, residuals, wgrad_residuals, output_struct(loss), traced.aux, loss_aux
    )


def _plan_of(functions: Functions, traced: Traced, stage: TracedStage) -> SplitBackward:
    num_side = len(jax.tree.leaves(traced.weights[1]))
    plan = SplitBackward.trace(
        stage.function,
        traced.weights,
        traced.x,
        traced.key,
        has_aux=True,
        platform=functions.platform,
        trainable=functions.trained.stages + (False,) * num_side,
    )
    for jaxpr in (plan.programs.f, plan.programs.b):
        # Custom derivatives, too, leave the pipeline's axis alone.
        check_axis_is_free(jaxpr, functions.axis_name, "stage_fn")
    return plan.map_programs(functions.as_run)


def _share(
    wanted: list[tuple[jax.ShapeDtypeStruct, ...]],
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], list[tuple[int, ...]]]:
    """Returns the fewest arrays that can hold any one list's, and their positions."""
    shared: list[jax.ShapeDtypeStruct] = []
    places = []
    for structs in wanted:
        own: list[int] = []
        for struct in structs:
            free = (
                place
                for place, other in enumerate(shared)
                if place not in own and _kind(other) == _kind(struct)
            )
            place = next(free, len(shared))
            if place == len(shared):
                shared.append(struct)
            own.append(place)
        places.append(tuple(own))
    return tuple(shared), places


def _kind(struct: jax.ShapeDtypeStruct) -> tuple:
    return struct.shape, struct.dtype, compat.is_on_host(struct)
