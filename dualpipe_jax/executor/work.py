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
from dualpipe_jax.executor.params import PipelineParams, microbatch_key
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
    # Not in a forward-only program:
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
    embed_backward: Callable[..., PyTree] | None = None  # dx, microbatch -> grads


@dataclasses.dataclass(frozen=True)
class Functions:
    """The user's functions, the step's key, and where the step runs.

    `stage_fns` holds each distinct function once. `axis_name` is the pipeline's axis.
    `key` is None without randomness, `platform` where it is unknown.
    """

    stage_fns: tuple[Callable[..., PyTree], ...]
    embed_fn: Callable[..., PyTree] | None
    loss_fn: Callable[..., Any] | None
    tied: bool
    program: Program
    axis_name: str
    key: jax.Array | None
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

    def embed(self, params: PyTree, inputs: PyTree, microbatch: jax.Array) -> PyTree:
        x = read(inputs, microbatch)
        if self.embed_fn is None:
            return x
        key = self.key_of(self.program.schedule.num_stages, microbatch)
        return _with_key(self.embed_fn, key, params, x)

    def loss(self, params: PipelineParams, y: PyTree, targets: PyTree):
        """Returns one microbatch's loss, its aux, and gradients of the mean loss."""
        loss_fn, tied = self.loss_fn, self.tied
        assert loss_fn is not None

        def scalar(outer, y):
            embed, head = outer
            out = _with_key(loss_fn, None, (embed, head) if tied else head, y, targets)
            return out if isinstance(out, tuple) else (out, None)

        outer = (params.embed if tied else None, params.head)
        loss, pullback, aux = jax.vjp(scalar, outer, y, has_aux=True)
        share = jnp.asarray(1 / self.program.schedule.num_microbatches, loss.dtype)
        (embed, head), dy = pullback(share)
        return loss, aux, head, embed if tied else None, dy


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
            y, _ = stage(p, x, functions.key_of(number, microbatch))
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
    plans = [
        SplitBackward.trace(
            stage, chunk, x, key, has_aux=True, platform=functions.platform
        )
        for stage in stages
    ]
    for plan in plans:  # custom derivatives, too, leave the pipeline's axis alone
        for jaxpr in (plan.programs.f, plan.programs.b):
            check_axis_is_free(jaxpr, functions.axis_name, "stage_fn")
    residuals, residual_places = _share([plan.residuals for plan in plans])
    wgrad_residuals, wgrad_places = _share([plan.wgrad_residuals for plan in plans])
    _, loss = functions.trace(
        "loss_fn",
        functions.loss_fn,  # pyright: ignore[reportArgumentType]
        (params.embed, params.head) if functions.tied else params.head,
        x,
        jax.eval_shape(read, targets, index),
    )
    loss_aux = _checks.check_loss(loss)
    _checks.check_aux(loss_aux, "loss_fn")

    def inputs_of(x, number, microbatch):
        return x, functions.key_of(number, microbatch)

    def work_of(plan: SplitBackward, residuals, wgrad_residuals) -> StageWork:
        def forward(p, *args):
            (y, aux), kept = plan.forward(p, *inputs_of(*args))
            return y, aux, kept

        def backward(*args):
            grads, cotangents = plan.backward(*args)
            return grads, cotangents[0]

        def backward_input(*args):
            cotangents, wgrad_residuals = plan.backward_input(*args)
            return cotangents[0], wgrad_residuals

        return StageWork(
            forward,
            backward,
            backward_input,
            plan.backward_weights,
            residuals,
            wgrad_residuals,
        )

    def pair(forward, backward):
        f, (p, *args) = forward
        b, backward_args = backward
        ((y, aux), kept), (grads, cotangents) = plans[f].forward_and_backward(
            (p, *inputs_of(*args)), backward_args, plans[b]
        )
        return (y, aux, kept), (grads, cotangents[0])

    def finish(y, microbatch):
        loss, *rest = functions.loss(params, y, read(targets, microbatch))
        return loss.astype(jnp.float32), *rest

    def embed_backward(dx, microbatch):
        _, pullback = jax.vjp(
            lambda p: functions.embed(p, inputs, microbatch), params.embed
        )
        return pullback(dx)[0]

    if jax.tree.leaves(params.embed):
        embed_backward, _ = functions.trace("embed_fn", embed_backward, x, index)
    else:
        embed_backward = None
    work = Work(
        stages=tuple(map(work_of, plans, residual_places, wgrad_places)),
        embed=embed,
        finish=functions.trace("loss_fn", finish, x, index)[0],
        pair=pair,
        embed_backward=embed_backward,
    )
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    return work, BufferShapes(x, residuals, wgrad_residuals, loss, stage_aux, loss_aux)


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

    Returns the embedding, microbatch -> x; shapes of x; stages, (params, x, key) -> (y,
    aux); and shapes of aux.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    embed = functools.partial(functions.embed, params.embed, inputs)
    embed, x = functions.trace("embed_fn", embed, index)
    _checks.check_activations(x, functions.embed_fn)
    key = jax.eval_shape(functions.key_of, index, index)
    stages, auxes = [], []
    for fn in functions.stage_fns:

        def call(p, x, key, fn=fn):
            return _with_key(fn, key, p, x)

        _, out = functions.trace("stage_fn", call, chunk, x, key)
        has_aux, aux = _checks.check_stage(out, x)
        _checks.check_aux(aux, "stage_fn")

        def stage(p, x, key, call=call, has_aux=has_aux):
            out = call(p, x, key)
            return out if has_aux else (out, None)

        stages.append(stage)
        auxes.append(aux)
    _checks.check_same_aux(auxes)
    return embed, x, stages, auxes[0]


def _with_key(fn: Callable[..., PyTree], key: jax.Array | None, *args) -> PyTree:
    # Flax's variables refuse writes in another trace than that of their making: a
    # function gets its own.
    args = jax.tree.map(lambda leaf: leaf, args)
    return fn(*args) if key is None else fn(*args, key=key)
