"""The user's functions, called for one microbatch: traced, checked, differentiated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dualpipe_jax import compat
from dualpipe_jax.executor import checks as _checks
from dualpipe_jax.executor.collectives import check_axis_is_free
from dualpipe_jax.executor.in_place import read
from dualpipe_jax.executor.keys import takes_key, with_key
from dualpipe_jax.executor.losses import Weighted, take_apart
from dualpipe_jax.executor.params import PipelineParams, microbatch_key, select_params
from dualpipe_jax.executor.permutes import within_groups
from dualpipe_jax.executor.trainable import combine, differentiable, select
from dualpipe_jax.lowering import Program

PyTree = Any
INDEX = jax.ShapeDtypeStruct((), jnp.int32)


class TracedStage(NamedTuple):
    """One of the stage functions, (weights, x, key) -> (y, aux).

    Attributes:
      function: to be differentiated.
      run: the same as traced, to be called.
    """

    function: Callable[..., tuple]
    run: Callable[..., tuple]


class Traced(NamedTuple):
    """What the forward functions are and return.

    Attributes:
      embed: microbatch -> x.
      x: shapes of the activations.
      weights: shapes of what a stage reads besides its input.
      key: shape of a stage's key, or None.
      stages: the distinct stage functions.
      aux: shapes of their auxiliary outputs.
    """

    embed: Callable[..., PyTree]
    x: PyTree
    weights: PyTree
    key: Any
    stages: list[TracedStage]
    aux: PyTree


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
        jaxpr = self.as_run(jaxpr)
        tree = jax.tree.structure(shapes)

        def run(*args: PyTree) -> PyTree:
            results = compat.evaluate(jaxpr, *jax.tree.leaves(args))
            return jax.tree.unflatten(tree, results)

        return run, shapes

    def as_run(self, jaxpr: Any) -> Any:
        """Returns a jaxpr in the form in which ranks may run it at different times."""
        return within_groups(jaxpr) if self.platform == "cpu" else jaxpr

    def trace_forward(
        self, params: PipelineParams, chunk: PyTree, inputs: PyTree
    ) -> Traced:
        """Traces the embedding and the stages for the first time, and checks them."""
        embed = functools.partial(self.embed, params.embed, inputs)
        embed, x = self.trace("embed_fn", embed, INDEX)
        _checks.check_activations(x, self.embed_fn)
        key = jax.eval_shape(self.key_of, INDEX, INDEX)
        weights = jax.eval_shape(self.with_side, chunk, INDEX)
        stages, auxes = [], []
        for fn in self.stage_fns:

            def call(weights, x, key, fn=fn):
                p, side = weights
                return with_key(fn, key, p, x, *(() if side is None else (side,)))

            traced, out = self.trace("stage_fn", call, weights, x, key)
            has_aux, aux = _checks.check_stage(out, x)
            _checks.check_aux(aux, "stage_fn")
            pair = functools.partial(_with_aux, has_aux)
            stages.append(TracedStage(pair(call), pair(traced)))
            auxes.append(aux)
        _checks.check_same_aux(auxes)
        return Traced(embed, x, weights, key, stages, auxes[0])

    def key_of(self, stage: Any, microbatch: jax.Array) -> jax.Array | None:
        return None if self.key is None else microbatch_key(self.key, stage, microbatch)

    def with_side(self, chunk: PyTree, microbatch: jax.Array) -> tuple[PyTree, PyTree]:
        """Returns what a stage reads besides its input: parameters, side inputs."""
        return chunk, read(self.side, microbatch)

    def embed(self, params: PyTree, inputs: PyTree, microbatch: jax.Array) -> PyTree:
        return self._embed_row(params, read(inputs, microbatch), microbatch)

    def _embed_row(self, params: PyTree, row: PyTree, microbatch: jax.Array) -> PyTree:
        if self.embed_fn is None:
            return row
        return self._call(self.embed_fn, 0, microbatch, params, row)

    def embed_backward(self, params: PyTree, inputs: PyTree, x: PyTree):
        """Returns dx, microbatch -> gradients of parameters, and of inputs if wanted.

        None where there are neither.
        """
        flags = self.trained.embed
        if not any(flags) and not self.input_grads:
            return None
        trained, frozen = (select(params, flags, wanted) for wanted in (True, False))

        def backward(dx, microbatch):
            row = read(inputs, microbatch)
            varied, fixed = self.varied(row), self.varied(row, False)

            def embed(params, row):
                params, row = combine(params, frozen), combine(row, fixed)
                return self._embed_row(params, row, microbatch)

            _, pullback = jax.vjp(embed, trained, varied)
            return pullback(dx)

        return self.trace("embed_fn", backward, x, INDEX)[0]

    def varied(self, inputs: PyTree, wanted: bool = True) -> PyTree:
        """Returns those of the inputs that get gradients, or only the others."""
        flags = (self.input_grads and has for has in differentiable(inputs))
        return select(inputs, tuple(flags), wanted)

    def call_loss(self, params: PipelineParams, y, targets, microbatch) -> Any:
        assert self.loss_fn is not None
        outer = (params.embed, params.head) if self.tied else params.head
        return self._call(self.loss_fn, 1, microbatch, outer, y, targets)

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

    def _call(self, fn: Callable[..., PyTree], number: int, microbatch, *args):
        """Calls a function that is no stage; its key is that of one after the last."""
        number += self.program.schedule.num_stages
        key = self.key_of(number, microbatch) if takes_key(fn) else None
        return with_key(fn, key, *args)


def _with_aux(has_aux: bool, fn: Callable[..., PyTree]) -> Callable[..., tuple]:
    return fn if has_aux else lambda *args: (fn(*args), None)
