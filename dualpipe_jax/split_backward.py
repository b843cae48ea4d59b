"""Splits the backward pass of any function into its input half and its weight half.

Zero-bubble schedules (and the last steps of DualPipe) run the backward pass in two
pieces: I, which computes the cotangents that the previous stage waits for, and W, the
weight gradients, which nobody waits for. Here no layer needs to know of it: the
function is traced, its pullback is cut in two by liveness, and what crosses each cut
(forward to backward, I to W) is a minimum cut over bytes in which cheap equations may
be repeated and matrix products may not. I and W together multiply as much as B.

The zero-bubble papers write B for what is I here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import dtypes

from dualpipe_jax import compat
from dualpipe_jax._cut import Policy, Status
from dualpipe_jax._fuse import fuse
from dualpipe_jax._jaxprs import flatten, trace
from dualpipe_jax._loops import sink, split

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Programs:
    """The four programs of a split, as jaxprs over flat lists; holds no arrays."""

    forward: Any  # constants, params, inputs -> outputs, aux, residuals
    backward: Any  # constants, params, residuals, cotangents -> input_cts, param_cts
    backward_input: Any  # the same -> input_cts, crossing
    backward_weights: Any  # constants, params, residuals, crossing -> param_cts
    in_tree: Any  # of (params, inputs)
    out_tree: Any
    aux_tree: Any
    in_avals: tuple[Any, ...]
    out_avals: tuple[Any, ...]
    num_params: int
    num_consts: int
    residual_avals: tuple[Any, ...]
    crossing_avals: tuple[Any, ...]

    def run_forward(self, consts, params, inputs):
        flat = _flatten_like(self.in_tree, (params, inputs), "params and inputs")
        outs = compat.evaluate(self.forward, *consts, *flat)
        num_outputs = self.out_tree.num_leaves
        num_aux = 0 if self.aux_tree is None else self.aux_tree.num_leaves
        outputs = jax.tree.unflatten(self.out_tree, outs[:num_outputs])
        residuals = tuple(map(_to_storage, outs[num_outputs + num_aux :]))
        if self.aux_tree is None:
            return outputs, residuals
        aux = outs[num_outputs : num_outputs + num_aux]
        return (outputs, jax.tree.unflatten(self.aux_tree, aux)), residuals

    def run_backward_input(self, consts, params, residuals, output_cts):
        args = self._backward_args(consts, params, residuals)
        cts = self._cotangents(output_cts)
        outs = compat.evaluate(self.backward_input, *args, *cts)
        num = len(outs) - len(self.crossing_avals)
        crossing = tuple(map(_to_storage, outs[num:]))
        return self._input_cts(outs[:num]), crossing

    def run_backward_weights(self, consts, params, residuals, crossing):
        args = self._backward_args(consts, params, residuals)
        crossing = _from_storage(crossing, self.crossing_avals, "crossing")
        return self._param_cts(compat.evaluate(self.backward_weights, *args, *crossing))

    def run_backward(self, consts, params, residuals, output_cts):
        args = self._backward_args(consts, params, residuals)
        outs = compat.evaluate(self.backward, *args, *self._cotangents(output_cts))
        num = sum(map(_has_cotangent, self.in_avals[self.num_params :]))
        return self._param_cts(outs[num:]), self._input_cts(outs[:num])

    def _backward_args(self, consts, params, residuals):
        params_tree, _ = self.in_tree.children()
        flat = _flatten_like(params_tree, params, "params")
        return [
            *consts,
            *flat,
            *_from_storage(residuals, self.residual_avals, "residuals"),
        ]

    def _cotangents(self, output_cts):
        flat = _flatten_like(self.out_tree, output_cts, "output_cts")
        kept = []
        for ct, aval in zip(flat, self.out_avals, strict=True):
            if not _has_cotangent(aval):
                continue
            if np.shape(ct) != aval.shape or ct.dtype != aval.dtype:
                raise ValueError(
                    f"output_cts must match the outputs: got {jax.typeof(ct)} for an "
                    f"output of type {aval}; cast or reshape the cotangent."
                )
            kept.append(ct)
        return kept

    def _input_cts(self, flat):
        avals = self.in_avals[self.num_params :]
        _, tree = self.in_tree.children()
        return jax.tree.unflatten(tree, _with_float0(avals, flat))

    def _param_cts(self, flat):
        tree, _ = self.in_tree.children()
        avals = self.in_avals[: self.num_params]
        return jax.tree.unflatten(tree, _with_float0(avals, flat))


@dataclasses.dataclass(frozen=True, eq=False)
class SplitBackward:
    """A plan for one function at fixed shapes: F, then I, then W (or B = I + W).

    Attributes:
      residuals: what F must keep until W, parameters excluded.
      crossing: what I must keep for W beside the residuals.
      outputs: structs of what the function returns.
      inputs: structs of its inputs, one tree per input.
      consts: arrays that the function closes over; no program keeps them per call.

    Examples:
      >>> import jax.numpy as jnp
      >>> def layer(w, x):
      ...     return jnp.tanh(x @ w)
      >>> w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
      >>> plan = SplitBackward.trace(layer, w, x)
      >>> [r.shape for r in plan.residuals], [c.shape for c in plan.crossing]
      ([(2, 4), (2, 4)], [(2, 4)])
      >>> y, residuals = plan.forward(w, x)
      >>> (dx,), crossing = plan.backward_input(w, residuals, jnp.ones_like(y))
      >>> dw = plan.backward_weights(w, residuals, crossing)
      >>> dx.shape, dw.shape
      ((2, 4), (4, 4))
    """

    programs: _Programs
    consts: tuple[Any, ...]
    residuals: tuple[jax.ShapeDtypeStruct, ...]
    crossing: tuple[jax.ShapeDtypeStruct, ...]
    outputs: PyTree
    inputs: PyTree

    @classmethod
    def trace(
        cls,
        fn: Callable[..., PyTree],
        params: PyTree,
        *inputs: PyTree,
        has_aux: bool = False,
        early_reductions: bool = True,
    ) -> SplitBackward:
        """Traces ``fn`` and cuts its backward pass.

        Args:
          fn: function of ``(params, *inputs)`` that returns a pytree of arrays, or
            ``(outputs, aux)`` with ``has_aux``.
          params: pytree of arrays or ``ShapeDtypeStruct``: what W is for.
          *inputs: pytrees of the same: what I is for.
          has_aux: whether ``fn`` returns auxiliary data that is not differentiated.
          early_reductions: whether a parameter gradient that is a mere sum (a norm's
            scale, a bias) may be summed in I where that spares storing an activation
            until W. Matrix products never move.

        Returns:
          The plan. Inside ``jax.shard_map`` it may name mesh axes.

        Raises:
          ValueError: if ``fn`` returns what ``jax.vjp`` cannot differentiate.
        """
        return _trace(cls, fn, params, inputs, has_aux, early_reductions)

    def forward(self, params: PyTree, *inputs: PyTree) -> tuple[PyTree, tuple]:
        """F. Returns (outputs, residuals), or ((outputs, aux), residuals)."""
        return self.programs.run_forward(self.consts, params, inputs)

    def backward_input(
        self, params: PyTree, residuals: Sequence[Any], output_cts: PyTree
    ) -> tuple[tuple, tuple]:
        """I. Returns (one cotangent per input, crossing)."""
        return self.programs.run_backward_input(
            self.consts, params, residuals, output_cts
        )

    def backward_weights(
        self, params: PyTree, residuals: Sequence[Any], crossing: Sequence[Any]
    ) -> PyTree:
        """W. Returns the cotangents of ``params``, in its structure."""
        return self.programs.run_backward_weights(
            self.consts, params, residuals, crossing
        )

    def backward(
        self, params: PyTree, residuals: Sequence[Any], output_cts: PyTree
    ) -> tuple[PyTree, tuple]:
        """B. Returns (cotangents of ``params``, one cotangent per input)."""
        return self.programs.run_backward(self.consts, params, residuals, output_cts)


def _trace(cls, fn, params, inputs, has_aux, early_reductions):
    primals = (params, inputs)
    flat, in_tree = jax.tree.flatten(primals)
    in_avals = tuple(jax.typeof(x) if _is_array(x) else _aval(x) for x in flat)
    record = {}

    def forward(*flat):
        params, inputs = jax.tree.unflatten(in_tree, flat)
        outputs, pullback, *aux = jax.vjp(fn, params, *inputs, has_aux=has_aux)
        record["out_tree"] = jax.tree.structure(outputs)
        record["aux_tree"] = jax.tree.structure(aux[0]) if has_aux else None
        leaves, record["pullback"] = jax.tree.flatten(pullback)
        return jax.tree.leaves(outputs), jax.tree.leaves(aux), leaves

    closed = trace(forward, in_avals)
    out_tree, aux_tree = record["out_tree"], record["aux_tree"]
    num_outputs = out_tree.num_leaves
    num_kept = num_outputs + (aux_tree.num_leaves if has_aux else 0)
    forward_jaxpr, consts = flatten(closed, inline_custom=False)
    out_avals = tuple(v.aval for v in forward_jaxpr.outvars[:num_outputs])
    vjp_avals = [v.aval for v in forward_jaxpr.outvars[num_kept:]]
    ct_avals = [aval for aval in out_avals if _has_cotangent(aval)]

    def backward(leaves, cts):
        pullback = jax.tree.unflatten(record["pullback"], leaves)
        full = jax.tree.unflatten(out_tree, _with_float0(out_avals, cts))
        param_cts, *input_cts = pullback(full)
        both = [*jax.tree.leaves(tuple(input_cts)), *jax.tree.leaves(param_cts)]
        return [ct for ct in both if ct.dtype != dtypes.float0]

    num_residuals = len(vjp_avals)
    closed = trace(
        lambda *args: backward(args[:num_residuals], args[num_residuals:]),
        [*vjp_avals, *ct_avals],
    )
    backward_jaxpr, backward_consts = flatten(closed, inline_custom=True)
    joint, num_consts, late = _join(
        forward_jaxpr, backward_jaxpr, len(consts), len(backward_consts), num_kept
    )
    consts = (*consts, *backward_consts)
    num_params = in_tree.children()[0].num_leaves
    num_static = num_consts + num_params
    num_inputs = len(in_avals) - num_params
    status = (
        [Status.STATIC] * num_static
        + [Status.EARLY] * num_inputs
        + [Status.LATE] * len(ct_avals)
    )
    first = split(
        joint,
        status,
        [i < num_kept for i in range(len(joint.outvars))],
        Policy(late_heavy=False),
        late_equations=late,
    )
    num_input_cts = sum(map(_has_cotangent, in_avals[num_params:]))
    status = (
        [Status.STATIC] * num_static
        + [Status.FREE] * len(first.crossing)
        + [Status.EARLY] * len(ct_avals)
    )
    backward_jaxpr = sink(first.late)
    second = split(
        backward_jaxpr,
        status,
        [i < num_input_cts for i in range(len(backward_jaxpr.outvars))],
        Policy(late_heavy=True, early_reductions=early_reductions),
    )
    residual_avals = tuple(v.aval for v in first.crossing)
    crossing_avals = tuple(v.aval for v in second.crossing)
    programs = _Programs(
        forward=first.early,
        backward=backward_jaxpr,
        backward_input=second.early,
        backward_weights=fuse(second.late),
        in_tree=in_tree,
        out_tree=out_tree,
        aux_tree=aux_tree,
        in_avals=in_avals,
        out_avals=out_avals,
        num_params=num_params,
        num_consts=num_consts,
        residual_avals=residual_avals,
        crossing_avals=crossing_avals,
    )
    in_structs = jax.tree.unflatten(in_tree, map(compat.struct, in_avals))
    return cls(
        programs=programs,
        consts=consts,
        residuals=tuple(map(_storage_struct, residual_avals)),
        crossing=tuple(map(_storage_struct, crossing_avals)),
        outputs=jax.tree.unflatten(out_tree, map(compat.struct, out_avals)),
        inputs=in_structs[1],
    )


def _join(forward, backward, num_consts, num_backward_consts, num_kept):
    """Puts the backward equations after the forward ones, in one jaxpr.

    Returns (jaxpr, number of constants, ids of the backward equations). Inputs:
    constants of both, params, inputs, cotangents. Outputs: those of the forward, then
    input and parameter cotangents.
    """
    saved = forward.outvars[num_kept:]
    own = backward.invars[:num_backward_consts]
    rest = backward.invars[num_backward_consts:]
    env = dict(zip(rest[: len(saved)], saved, strict=True))
    cotangents = rest[len(saved) :]

    def read(atom):
        return atom if isinstance(atom, compat.Literal) else env.get(atom, atom)

    eqns = [eqn.replace(invars=[read(a) for a in eqn.invars]) for eqn in backward.eqns]
    consts = [*forward.invars[:num_consts], *own]
    joint = compat.new_jaxpr(
        [*consts, *forward.invars[num_consts:], *cotangents],
        [*forward.outvars[:num_kept], *map(read, backward.outvars)],
        [*forward.eqns, *eqns],
        forward,
    )
    return joint, len(consts), frozenset(map(id, eqns))


def split_vjp(
    fn: Callable[..., PyTree], params: PyTree, *inputs: PyTree, has_aux: bool = False
) -> tuple:
    """Like ``jax.vjp``, with the backward pass in two halves.

    Args:
      fn: function of ``(params, *inputs)``.
      params: pytree of arrays whose cotangents the second half computes.
      *inputs: pytrees of arrays whose cotangents the first half computes.
      has_aux: whether ``fn`` returns ``(outputs, aux)``.

    Returns:
      ``(outputs, backward_input, backward_weights)``, and ``aux`` last with
      ``has_aux``. ``backward_input(output_cotangents)`` returns
      ``(input_cotangents, saved)``; ``backward_weights(saved)`` returns the cotangents
      of ``params``. Both are pytrees and may cross ``jax.jit`` boundaries.

    Examples:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> y, backward_input, backward_weights = split_vjp(lambda w, x: x @ w, w, x)
      >>> (dx,), saved = backward_input(jnp.ones_like(y))
      >>> dw = backward_weights(saved)
      >>> dx.shape, dw.shape
      ((4, 3), (3, 2))
    """
    plan = SplitBackward.trace(
        fn, params, *inputs, has_aux=has_aux, early_reductions=False
    )
    programs = plan.programs
    outputs, residuals = programs.run_forward(plan.consts, params, inputs)
    backward_input = jax.tree_util.Partial(
        programs.run_backward_input, plan.consts, params, residuals
    )
    backward_weights = jax.tree_util.Partial(
        programs.run_backward_weights, plan.consts, params, residuals
    )
    if has_aux:
        outputs, aux = outputs
        return outputs, backward_input, backward_weights, aux
    return outputs, backward_input, backward_weights


def _is_array(x: Any) -> bool:
    return not isinstance(x, jax.ShapeDtypeStruct)


def _aval(struct: jax.ShapeDtypeStruct) -> Any:
    return jax.make_jaxpr(lambda x: x)(struct).in_avals[0]


def _has_cotangent(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, np.inexact)


def _with_float0(avals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """Puts the zeros of float0 where ``jax.vjp`` has them, at integer values."""
    given = iter(cotangents)
    return [
        next(given) if _has_cotangent(a) else np.zeros(a.shape, dtypes.float0)
        for a in avals
    ]


def _flatten_like(tree: Any, value: PyTree, name: str) -> list[Any]:
    leaves, actual = jax.tree.flatten(value)
    if actual != tree:
        raise ValueError(
            f"{name} must have the structure that the plan was traced with: expected "
            f"{tree}, got {actual}; trace a plan for it."
        )
    return leaves


def _is_key(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _to_storage(x: Any) -> Any:
    """Random keys are kept as their bits, so that any buffer can hold them."""
    return jax.random.key_data(x) if _is_key(jax.typeof(x)) else x


def _storage_struct(aval: Any) -> jax.ShapeDtypeStruct:
    struct = compat.struct(aval)
    return jax.eval_shape(jax.random.key_data, struct) if _is_key(aval) else struct


def _from_storage(values: Sequence[Any], avals: Sequence[Any], name: str) -> list:
    if len(values) != len(avals):
        raise ValueError(
            f"{name} must hold {len(avals)} arrays as the plan says, got {len(values)}."
        )
    return [
        jax.random.wrap_key_data(v, impl=compat.key_impl(a)) if _is_key(a) else v
        for v, a in zip(values, avals, strict=True)
    ]
