"""Splits the backward pass of any function into its input half and its weight half.

Zero-bubble schedules, and the ends of DualPipe, run the backward pass in two pieces: I
computes the cotangents that the previous stage waits for, W the weight gradients, which
no other rank waits for. No layer needs to be written for this. The function is traced,
its pullback is cut in two by liveness, and what passes from F to the backward, and from
I to W, is a minimum cut over bytes in which elementwise equations may be repeated and
matrix products may not: I and W together multiply as much as B.

The zero-bubble papers call our I B (Qi et al. 2023, arXiv:2401.10241).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dualpipe_jax import compat
from dualpipe_jax.backward.programs import Programs, storage_struct, trace_programs

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class SplitBackward:
    """A plan for one function at fixed shapes: F, then I and W, or B = I + W.

    Attributes:
      residuals: what F must keep until W; parameters and constants are not among them.
      wgrad_residuals: what I must keep for W besides the residuals.
      read_by_weights: for each residual, whether W reads it; the others can be freed
        after I.
      outputs: structs of what the function returns, without aux.
      inputs: structs of its inputs, one pytree per input.
      consts: arrays that the function closes over; nothing keeps them per call.

    Examples:
      >>> import jax.numpy as jnp
      >>> def layer(w, x):
      ...     return jnp.tanh(x @ w)
      >>> w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
      >>> plan = SplitBackward.trace(layer, w, x)
      >>> [r.shape for r in plan.residuals], [c.shape for c in plan.wgrad_residuals]
      ([(2, 4), (2, 4)], [(2, 4)])
      >>> y, residuals = plan.forward(w, x)
      >>> (dx,), wgrad_residuals = plan.backward_input(w, residuals, jnp.ones_like(y))
      >>> dw = plan.backward_weights(w, residuals, wgrad_residuals)
      >>> dx.shape, dw.shape
      ((2, 4), (4, 4))
    """

    residuals: tuple[jax.ShapeDtypeStruct, ...]
    wgrad_residuals: tuple[jax.ShapeDtypeStruct, ...]
    read_by_weights: tuple[bool, ...]
    outputs: PyTree
    inputs: tuple[PyTree, ...]
    consts: tuple[Any, ...] = dataclasses.field(repr=False)
    programs: Programs = dataclasses.field(repr=False)

    @classmethod
    def trace(
        cls,
        fn: Callable[..., PyTree],
        params: PyTree,
        *inputs: PyTree,
        has_aux: bool = False,
        early_reductions: bool = True,
        platform: str | None = None,
        trainable: Sequence[bool] | None = None,
    ) -> SplitBackward:
        """Traces ``fn`` and cuts its backward pass.

        Inside ``jax.shard_map`` the function may use mesh axes. It may close over
        traced values; the plan is then valid in that trace only.

        Args:
          fn: function of ``(params, *inputs)`` that returns a pytree of arrays, or
            ``(outputs, aux)`` with ``has_aux``.
          params: pytree of arrays or ``jax.ShapeDtypeStruct``; W computes their
            cotangents.
          *inputs: pytrees likewise; I computes their cotangents.
          has_aux: whether ``fn`` also returns data that is not differentiated.
          early_reductions: whether a weight gradient that is only a sum (a norm's
            scale, say) may be summed in I where this avoids keeping an activation for
            W. Matrix products never move.
          platform: where the programs will run, `"cpu"`, `"cuda"` or `"rocm"`, if
            known. Then only its branch of a `lax.platform_dependent` is kept, and the
            programs must not be differentiated or vmapped again. Otherwise both halves
            keep what any branch needs.
          trainable: for each leaf of ``params``, whether W computes its cotangent; by
            default for all. The others are read again where the backward needs them,
            and their cotangents are zeros of dtype float0, as those of integers.

        Returns:
          The plan.

        Raises:
          ValueError: if an argument or a result of ``fn`` is not an array,
            ``trainable`` has another length than ``params`` has leaves, or
            ``platform`` is `"gpu"`, which could be either GPU platform.
        """
        if platform == "gpu":
            raise ValueError(f"{platform=} is ambiguous; pass 'cuda' or 'rocm'.")
        programs, consts = trace_programs(
            fn, params, inputs, has_aux, early_reductions, platform, trainable
        )
        avals = programs.in_avals[programs.num_params :]
        inputs_tree = programs.in_tree.children()[1]
        out_structs = map(compat.struct, programs.out_avals)
        return cls(
            residuals=tuple(map(storage_struct, programs.residual_avals)),
            wgrad_residuals=tuple(map(storage_struct, programs.wgrad_residual_avals)),
            read_by_weights=programs.read_by_weights,
            outputs=jax.tree.unflatten(programs.out_tree, out_structs),
            inputs=jax.tree.unflatten(inputs_tree, map(compat.struct, avals)),
            consts=consts,
            programs=programs,
        )

    def map_programs(self, rewrite: Callable[[Any], Any]) -> SplitBackward:
        """Returns the plan with each program, an open jaxpr, rewritten."""
        p = self.programs
        f, i, w, b = map(rewrite, (p.f, p.i, p.w, p.b))
        programs = dataclasses.replace(p, f=f, i=i, w=w, b=b)
        return dataclasses.replace(self, programs=programs)

    def forward(self, params: PyTree, *inputs: PyTree) -> tuple[PyTree, tuple]:
        """F. Returns (outputs, residuals), or ((outputs, aux), residuals)."""
        return self.programs.forward(self.consts, params, inputs)

    def backward_input(
        self, params: PyTree, residuals: Sequence[Any], output_cts: PyTree
    ) -> tuple[tuple[PyTree, ...], tuple]:
        """I. Returns (one cotangent per input, wgrad_residuals)."""
        operands = self.programs.operands(self.consts, params, residuals)
        return self.programs.backward_input(operands, output_cts)

    def backward_weights(
        self, params: PyTree, residuals: Sequence[Any], wgrad_residuals: Sequence[Any]
    ) -> PyTree:
        """W. Returns the cotangents of ``params``, in its structure."""
        operands = self.programs.operands(self.consts, params, residuals)
        return self.programs.backward_weights(operands, wgrad_residuals)

    def backward(
        self, params: PyTree, residuals: Sequence[Any], output_cts: PyTree
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        """B. Returns (cotangents of ``params``, one cotangent per input)."""
        operands = self.programs.operands(self.consts, params, residuals)
        return self.programs.backward(operands, output_cts)

    def forward_and_backward(
        self,
        forward: tuple[PyTree, ...],
        backward: tuple[PyTree, Sequence[Any], PyTree],
        other: SplitBackward | None = None,
    ) -> tuple[tuple[PyTree, tuple], tuple[PyTree, tuple[PyTree, ...]]]:
        """Runs F of one microbatch and B of another, interleaved so that each hides the
        communication of the other; see `dualpipe_jax.backward.interleave`.

        The result must not be differentiated or vmapped again.

        Args:
          forward: (params, *inputs), the arguments of `forward`.
          backward: (params, residuals, output_cts), the arguments of `backward`.
          other: the plan that B belongs to; by default this one.

        Returns:
          The results of `forward` and of `backward`.
        """
        params, *inputs = forward
        other = self if other is None else other
        return self.programs.forward_and_backward(
            self.consts,
            (params, tuple(inputs)),
            other.programs,
            other.consts,
            backward,
        )


def split_vjp(
    fn: Callable[..., PyTree], params: PyTree, *inputs: PyTree, has_aux: bool = False
) -> tuple:
    """Like ``jax.vjp``, with the backward pass in two halves.

    ``backward_input(output_cotangents)`` returns ``(input_cotangents, saved)`` and
    computes no weight gradient; ``backward_weights(saved)`` returns the cotangents of
    ``params`` and repeats no matrix product. Both are pytrees, and ``saved`` is a
    pytree of arrays: all may cross ``jax.jit`` boundaries.

    Args:
      fn: function of ``(params, *inputs)`` that returns a pytree of arrays, or
        ``(outputs, aux)`` with ``has_aux``.
      params: pytree of arrays.
      *inputs: pytrees of arrays.
      has_aux: whether ``fn`` also returns data that is not differentiated.

    Returns:
      ``(outputs, backward_input, backward_weights)``, with ``aux`` last if ``has_aux``.
      Cotangents of integer values are zeros of dtype float0, as in ``jax.vjp``.

    Raises:
      ValueError: if an argument or a result of ``fn`` is not an array.

    Examples:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> y, backward_input, backward_weights = split_vjp(lambda w, x: x @ w, w, x)
      >>> (dx,), saved = backward_input(jnp.ones_like(y))
      >>> dw = backward_weights(saved)
      >>> dx.shape, dw.shape
      ((4, 3), (3, 2))
    """
    programs, consts = trace_programs(fn, params, inputs, has_aux, False)
    outputs, residuals = programs.forward(consts, params, inputs)
    operands = programs.operands(consts, params, residuals)
    backward_input = jax.tree_util.Partial(programs.start, operands)
    backward_weights = jax.tree_util.Partial(
        programs.finish, programs.kept_until_weights(operands)
    )
    if has_aux:
        outputs, aux = outputs
        return outputs, backward_input, backward_weights, aux
    return outputs, backward_input, backward_weights
