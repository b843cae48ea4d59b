"""From the user's functions to the work of a tick, for one microbatch each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax import _checks
from dualpipe_jax._executor import Work
from dualpipe_jax.lowering import Program
from dualpipe_jax.params import PipelineParams, microbatch_key
from dualpipe_jax.split_backward import SplitBackward

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Functions:
    """What the user passed, the key of this step (None without randomness), and where
    it runs (None: unknown).
    """

    stage_fn: Callable[..., PyTree]
    embed_fn: Callable[..., PyTree] | None
    loss_fn: Callable[..., Any] | None
    tied: bool
    program: Program
    key: jax.Array | None
    platform: str | None = None

    def key_of(self, stage: Any, microbatch: jax.Array) -> jax.Array | None:
        return None if self.key is None else microbatch_key(self.key, stage, microbatch)

    def embed(self, params: PyTree, inputs: PyTree, microbatch: jax.Array) -> PyTree:
        x = _microbatch(inputs, microbatch)
        if self.embed_fn is None:
            return x
        key = self.key_of(self.program.schedule.num_stages, microbatch)
        return _with_key(self.embed_fn, key, params, x)

    def loss(self, params: PipelineParams, y: PyTree, targets: PyTree):
        """The loss of one microbatch, its aux, and the gradients of the mean loss."""
        loss_fn, tied = self.loss_fn, self.tied
        assert loss_fn is not None

        def scalar(outer, y):
            embed, head = outer
            out = loss_fn((embed, head) if tied else head, y, targets)
            return out if isinstance(out, tuple) else (out, None)

        outer = (params.embed if tied else None, params.head)
        loss, pullback, aux = jax.vjp(scalar, outer, y, has_aux=True)
        share = jnp.asarray(1 / self.program.schedule.num_microbatches, loss.dtype)
        (embed, head), dy = pullback(share)
        return loss, aux, head, embed if tied else None, dy


class Buffers(NamedTuple):
    """Shapes of one slot of each buffer, and of the auxiliary outputs."""

    activation: PyTree
    residuals: PyTree
    crossing: PyTree
    output: PyTree
    stage_aux: PyTree
    loss_aux: PyTree


def forward_work(
    functions: Functions, params: PipelineParams, chunk: PyTree, inputs, targets
) -> tuple[Work, Buffers]:
    """The work of a program that runs no backward; its output is the last stage's."""
    del targets
    x, stage, _ = _trace_stage(functions, params, chunk, inputs)

    def forward(p, x, number, microbatch):
        y, _ = stage(p, x, functions.key_of(number, microbatch))
        return y, None, ()

    work = Work(
        embed=functools.partial(functions.embed, params.embed, inputs),
        forward=forward,
        finish=lambda y, microbatch: (y, None, None, None, None),
    )
    return work, Buffers(x, (), (), x, None, None)


def training_work(
    functions: Functions, params: PipelineParams, chunk: PyTree, inputs, targets
) -> tuple[Work, Buffers]:
    """The work of a training program: backward in one piece or two, and the loss."""
    x, stage, stage_aux = _trace_stage(functions, params, chunk, inputs)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(functions.key_of, index, index)
    plan = SplitBackward.trace(
        stage, chunk, x, key, has_aux=True, platform=functions.platform
    )
    loss_aux = _checks.check_loss(
        jax.eval_shape(
            functions.loss_fn,  # pyright: ignore[reportArgumentType]
            (params.embed, params.head) if functions.tied else params.head,
            x,
            jax.eval_shape(_microbatch, targets, index),
        )
    )

    def forward(p, x, number, microbatch):
        key = functions.key_of(number, microbatch)
        (y, aux), residuals = plan.forward(p, x, key)
        return y, aux, residuals

    def backward(p, residuals, dy):
        grads, cotangents = plan.backward(p, residuals, dy)
        return grads, cotangents[0]

    def backward_input(p, residuals, dy):
        cotangents, crossing = plan.backward_input(p, residuals, dy)
        return cotangents[0], crossing

    def pair(forward_args, backward_args):
        p, x, number, microbatch = forward_args
        key = functions.key_of(number, microbatch)
        ((y, aux), residuals), (grads, cotangents) = plan.forward_and_backward(
            (p, x, key), backward_args
        )
        return (y, aux, residuals), (grads, cotangents[0])

    def finish(y, microbatch):
        loss, *rest = functions.loss(params, y, _microbatch(targets, microbatch))
        return loss.astype(jnp.float32), *rest

    def embed_backward(dx, microbatch):
        _, pullback = jax.vjp(
            lambda p: functions.embed(p, inputs, microbatch), params.embed
        )
        return pullback(dx)[0]

    work = Work(
        embed=functools.partial(functions.embed, params.embed, inputs),
        forward=forward,
        finish=finish,
        backward=backward,
        pair=pair,
        backward_input=backward_input,
        backward_weights=plan.backward_weights,
        embed_backward=embed_backward if jax.tree.leaves(params.embed) else None,
    )
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    buffers = Buffers(x, plan.residuals, plan.crossing, loss, stage_aux, loss_aux)
    return work, buffers


def _trace_stage(functions: Functions, params: PipelineParams, chunk: PyTree, inputs):
    """Shapes of an activation, the stage as (params, x, key) -> (y, aux), its aux."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    x = jax.eval_shape(lambda p, m: functions.embed(p, inputs, m), params.embed, index)
    _checks.check_activations(x, functions.embed_fn)

    def call(p, x, key):
        return _with_key(functions.stage_fn, key, p, x)

    key = jax.eval_shape(functions.key_of, index, index)
    has_aux, aux = _checks.check_stage(jax.eval_shape(call, chunk, x, key), x)

    def stage(p, x, key):
        out = call(p, x, key)
        return out if has_aux else (out, None)

    return x, stage, aux


def _with_key(fn: Callable[..., PyTree], key: jax.Array | None, *args) -> PyTree:
    return fn(*args) if key is None else fn(*args, key=key)


def _microbatch(tree: PyTree, microbatch: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, microbatch, keepdims=False), tree
    )
