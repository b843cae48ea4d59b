"""Turns the user's functions into the work of a tick, for one microbatch each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dualpipe_jax import compat
from dualpipe_jax.backward import SplitBackward
from dualpipe_jax.executor import checks as _checks
from dualpipe_jax.executor.collectives import check_axis_is_free
from dualpipe_jax.executor.in_place import read
from dualpipe_jax.executor.keys import takes_key, with_key
from dualpipe_jax.executor.losses import Weighted, output_struct, take_apart
from dualpipe_jax.executor.params import PipelineParams, microbatch_key, select_params
from dualpipe_jax.executor.trainable import combine, differentiable, select
from dualpipe_jax.lowering import Program

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


@dataclasses.dataclass(frozen=True)
class Functions:
    """The user's functions, the step's key, and where the step runs.

    `stage_fns` holds each distinct function once. `axis_name` is the pipeline's axis.
    `key` is None without randomness, `side` without side inputs, `platform` where it is
    unknown. `trained` has a flag for each parameter.
    """

    stage_fns: tuple[Callable[..., PyTree], ...]
    embed_fn: Callable[..., PyTree] | None
    loss_fn: Callable[..., Any] | None
    tied: bool
    program: Program
    axis_name: str
    key: jax.Array | None
    side: PyTree
    trained: PipelineParams
    input_grads: bool
    platform: str | None = None

    def trace(
        self, name: str, function: Callable[..., PyTree], *args: PyTree
    ) -> tuple[Callable[..., PyTree], PyTree]:
        """Traces a function that calls one of the user's, once for all ticks.

        Args:
          name: of the user's function, for error messages.
          function: the function; may close over values of the current trace.
          *args: arrays, or their shapes.

        Returns:
          The function as traced, for arguments of the same structure; and the shapes of
          its results.

        Raises:
          ValueError: if it communicates over the pipeline's axis.
        """
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        check_axis_is_free(jaxpr, self.axis_name, name)
        tree = jax.tree.structure(shapes)

        def run(*args: PyTree) -> PyTree:
            results = compat.evaluate_closed(jaxpr, *jax.tree.leaves(args))
            return jax.tree.unflatten(tree, results)

        return run, shapes

    def key_of(self, stage: Any, microbatch: jax.Array) -> jax.Array | None:
        return None if self.key is None else microbatch_key(self.key, stage, microbatch)

    def with_side(self, chunk: PyTree, microbatch: jax.Array) -> tuple[PyTree, PyTree]:
        """Returns what a stage reads besides its input: parameters, side inputs."""
        return chunk, read(self.side, microbatch)

    def embed(self, params: PyTree, inputs: PyTree, microbatch: jax.Array) -> PyTree:
        return self.embed_row(params, read(inputs, microbatch), microbatch)

    def embed_row(self, params: PyTree, row: PyTree, microbatch: jax.Array) -> PyTree:
        if self.embed_fn is None:
            return row
        return self._call(self.embed_fn, 0, microbatch, params, row)

    def varied(self, inputs: PyTree, wanted: bool = True) -> PyTree:
        """Returns those of the inputs that get gradients, or only the others."""
        flags = (self.input_grads and has for has in differentiable(inputs))
        return select(inputs, tuple(flags), wanted)

    def call_loss(self, params: PipelineParams, y, targets, microbatch) -> Any:
        assert self.loss_fn is not None
        outer = (params.embed, params.head) if self.tied else params.head
        return self._call(self.loss_fn, 1, microbatch, outer, y, targets)

    def _call(self, fn: Callable[..., PyTree], number: int, microbatch, *args):
        """Calls a function that is no stage; its key is that of one after the last."""
        number += self.program.schedule.num_stages
        key = self.key_of(number, microbatch) if takes_key(fn) else None
        return with_key(fn, key, *args)

    def loss(self, params: PipelineParams, y: PyTree, targets: PyTree, microbatch):
        """Returns one microbatch's loss, its aux, and gradients.

        Gradients are those of the mean loss, or of the sum of `Weighted` losses.
        """
        outer = PipelineParams(None, params.embed if self.tied else None, params.head)
        flags = self.trained
        flags = PipelineParams((), flags.embed if self.tied else (), flags.head)
        frozen = select_params(outer, flags, False)

        def scalar(outer, y):
            out = self.call_loss(outer.combine(frozen), y, targets, microbatch)
            total, weight, aux = take_apart(out)
            return total, (weight, aux)

        loss, pullback, (weight, aux) = jax.vjp(
            scalar, select_params(outer, flags), y, has_aux=True
        )
        count = self.program.schedule.num_microbatches if weight is None else 1
        grads, dy = pullback(jnp.asarray(1 / count, loss.dtype))
        output = loss.astype(jnp.float32)
        if weight is not None:
            output = Weighted(output, jnp.asarray(weight).astype(jnp.float32))
        return output, aux, grads.head, grads.embed if self.tied else None, dy


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
    embed, x, stages, _ = _trace_stages(functions, params, chunk, inputs)

    def work_of(stage) -> StageWork:
        def forward(p, x, number, microbatch):
            read = functions.with_side(p, microbatch)
            y, _ = stage(read, x, functions.key_of(number, microbatch))
            return y, None, ()

        return StageWork(forward)

    work = Work(
        stages=tuple(map(work_of, stages)),
        embed=embed,
        finish=lambda y, microbatch: (y, None, None, None, None),
    )
    return work, BufferShapes(x, (), (), x, None, None)


def training_work(
    functions: Functions, params: PipelineParams, chunk: PyTree, inputs, targets
) -> tuple[Work, BufferShapes]:
    """Returns the work of a training program: whole and split backwards, and loss."""
    embed, x, stages, stage_aux = _trace_stages(functions, params, chunk, inputs)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(functions.key_of, index, index)
    weights = jax.eval_shape(functions.with_side, chunk, index)
    num_side = len(jax.tree.leaves(weights[1]))
    plans = [
        SplitBackward.trace(
            stage,
            weights,
            x,
            key,
            has_aux=True,
            platform=functions.platform,
            trainable=functions.trained.stages + (False,) * num_side,
        )
        for stage in stages
    ]
    for plan in plans:  # custom derivatives, too, leave the pipeline's axis alone
        for jaxpr in (plan.programs.f, plan.programs.b):
            check_axis_is_free(jaxpr, functions.axis_name, "stage_fn")
    residuals, residual_places = _share([plan.residuals for plan in plans])
    wgrad_residuals, wgrad_places = _share([plan.wgrad_residuals for plan in plans])
    row = jax.eval_shape(read, targets, index)
    _, loss = functions.trace("loss_fn", functions.call_loss, params, x, row, index)
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
            read = functions.with_side(p, microbatch)
            grads, cotangents = plan.backward(read, residuals, dy)
            return trained(grads), cotangents[0]

        def backward_input(p, residuals, dy, microbatch):
            read = functions.with_side(p, microbatch)
            cotangents, wgrad_residuals = plan.backward_input(read, residuals, dy)
            return cotangents[0], wgrad_residuals

        def backward_weights(p, residuals, wgrad_residuals, microbatch):
            read = functions.with_side(p, microbatch)
            return trained(plan.backward_weights(read, residuals, wgrad_residuals))

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
        embed=embed,
        finish=functions.trace("loss_fn", finish, x, index)[0],
        pair=pair,
        embed_backward=_embed_backward(functions, params.embed, inputs, x),
    )
    return work, BufferShapes(
        x, residuals, wgrad_residuals, output_struct(loss), stage_aux, loss_aux
    )


def _embed_backward(functions: Functions, params: PyTree, inputs: PyTree, x: PyTree):
    """Returns the backward of the embedding, or None where nothing needs it."""
    flags = functions.trained.embed
    if not any(flags) and not functions.input_grads:
        return None
    trained, frozen = (select(params, flags, wanted) for wanted in (True, False))

    def backward(dx, microbatch):
        row = read(inputs, microbatch)
        varied, fixed = functions.varied(row), functions.varied(row, False)

        def embed(params, row):
            params, row = combine(params, frozen), combine(row, fixed)
            return functions.embed_row(params, row, microbatch)

        _, pullback = jax.vjp(embed, trained, varied)
        return pullback(dx)

    index = jax.ShapeDtypeStruct((), jnp.int32)
    return functions.trace("embed_fn", backward, x, index)[0]


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
                if place not in own
                and (other.shape, other.dtype) == (struct.shape, struct.dtype)
            )
            place = next(free, len(shared))
            if place == len(shared):
                shared.append(struct)
            own.append(place)
        places.append(tuple(own))
    return tuple(shared), places


def _trace_stages(functions: Functions, params: PipelineParams, chunk: PyTree, inputs):
    """Traces the forward functions for the first time.

    Returns the embedding, microbatch -> x; shapes of x; stages, ((params, side), x,
    key) -> (y, aux); and shapes of aux.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    embed = functools.partial(functions.embed, params.embed, inputs)
    embed, x = functions.trace("embed_fn", embed, index)
    _checks.check_activations(x, functions.embed_fn)
    key = jax.eval_shape(functions.key_of, index, index)
    weights = jax.eval_shape(functions.with_side, chunk, index)
    stages, auxes = [], []
    for fn in functions.stage_fns:

        def call(weights, x, key, fn=fn):
            p, side = weights
            return with_key(fn, key, p, x, *(() if side is None else (side,)))

        _, out = functions.trace("stage_fn", call, weights, x, key)
        has_aux, aux = _checks.check_stage(out, x)
        _checks.check_aux(aux, "stage_fn")

        def stage(weights, x, key, call=call, has_aux=has_aux):
            out = call(weights, x, key)
            return out if has_aux else (out, None)

        stages.append(stage)
        auxes.append(aux)
    _checks.check_same_aux(auxes)
    return embed, x, stages, auxes[0]
