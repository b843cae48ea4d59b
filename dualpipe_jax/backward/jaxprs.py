"""Jaxprs as flat lists of equations: their costs and their dependencies."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core

from dualpipe_jax import compat

Atom = Any  # a Var or a Literal
Literal = jex_core.Literal


class Kind(enum.IntEnum):
    """The cost of running an equation a second time."""

    CHEAP = 0  # elementwise or a change of layout: may be repeated
    REDUCE = 1  # large input, small output: never repeated, but free to move
    FIXED = 2  # not worth repeating, though not a matrix product
    HEAVY = 3  # matrix products, loops of unknown length, collectives, random bits


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CHEAP = _names("""
    abs acos acosh add add_any and asin asinh atan atan2 atanh axis_index
    bitcast_convert_type broadcast_in_dim cbrt ceil clamp clz complex concatenate conj
    convert_element_type copy copy_p cos cosh digamma div dynamic_slice empty empty2 eq
    erf erf_inv erfc exp exp2 expand_dims expm1 floor ge gt imag integer_pow iota
    is_finite layout_constraint le lgamma log log1p log2 logistic lt max min mul name ne
    neg nextafter not one_minus_square optimization_barrier or pad pcast polynomial
    population_count pow pvary random_fold_in random_seed random_split random_unwrap
    random_wrap real reduce_precision rem reshape rev round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt square
    squeeze stack stop_gradient sub tan tanh transpose unstack xor
""")
_REDUCE = _names("""
    argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max
    reduce_min reduce_or reduce_prod reduce_sum reduce_xor
""")
_FIXED = _names("""
    approx_top_k device_put dynamic_update_slice gather reduce reduce_window
    reduce_window_max reduce_window_min reduce_window_sum scatter scatter-add
    scatter_add scatter_max scatter_min scatter_mul select_and_gather_add
    select_and_scatter_add sharding_constraint sort top_k
""")

_WITH_BODIES = ("scan", "cond", "shard_map")


def real_effects(eqn: Any) -> set[Any]:
    """Returns the effects that must happen once: prints, callbacks, references.

    In JAX the use of a mesh axis is an effect too, but only as an annotation.
    """
    return {e for e in eqn.effects if type(e).__name__ != "NamedAxisEffect"}


def kind(eqn: Any) -> Kind:
    """Returns the cost of running ``eqn`` a second time."""
    if real_effects(eqn):
        return Kind.HEAVY
    name = eqn.primitive.name
    # What lies in the host's memory is fetched again rather than kept on the device.
    if name in _CHEAP or compat.is_fetch(eqn):
        return Kind.CHEAP
    if name in _REDUCE:
        return Kind.REDUCE
    if name in _FIXED:
        return Kind.FIXED
    body = compat.custom_body(eqn) or compat.call_body(eqn)
    if body is not None:
        inner, _ = compat.open_jaxpr(body)
        return max((kind(e) for e in inner.eqns), default=Kind.CHEAP)
    if name in _WITH_BODIES:
        kinds = (kind(e) for body in bodies(eqn) for e in body.eqns)
        return max(Kind.FIXED, max(kinds, default=Kind.FIXED))
    return Kind.HEAVY


def nbytes(aval: Any) -> int:
    """Returns the size of a value in bytes (at least 1, so that nothing is free)."""
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    itemsize = 4 if dtype is None else dtype.itemsize
    return max(1, int(np.prod(shape, dtype=np.int64)) * itemsize)


def is_var(atom: Atom) -> bool:
    """Whether an operand is a variable, not a literal."""
    return not isinstance(atom, Literal)


def is_barrier(eqn: Any) -> bool:
    """Whether an equation is an `optimization_barrier`."""
    return eqn.primitive.name == "optimization_barrier"


def bodies(eqn: Any) -> tuple[Any, ...]:
    """Returns the bodies of a scan, a cond or a shard_map as open jaxprs."""
    closed = eqn.params.get("branches") or (eqn.params["jaxpr"],)
    return tuple(compat.open_jaxpr(body)[0] for body in closed)


def jaxprs_in(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the bodies of any equation, from its parameters; closed or open."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield item


def needed_operands(
    eqn: Any, needed: Sequence[bool], *, effects: bool = False
) -> list[bool]:
    """Returns which operands of ``eqn`` its ``needed`` results depend on.

    With ``effects``, includes those that prints inside it depend on.
    """
    match eqn.primitive.name:
        case "optimization_barrier":
            return list(needed)
        case "scan":
            num_consts, num_carry = compat.scan_sizes(eqn)
            needed = scan_closure(eqn, needed, effects=effects)
            (body,) = bodies(eqn)
            live = live_vars(body, needed, effects=effects)
            operands = [v in live for v in body.invars]
            operands[num_consts : num_consts + num_carry] = needed[:num_carry]
            return operands
        case "cond" | "shard_map":
            lives = [(b, live_vars(b, needed, effects=effects)) for b in bodies(eqn)]
            inner = zip(
                *([v in live for v in b.invars] for b, live in lives), strict=True
            )
            index = [True] if eqn.primitive.name == "cond" else []
            return index + [any(flags) for flags in inner]
        case _:
            return [True] * len(eqn.invars)


def scan_closure(
    eqn: Any, needed: Sequence[bool], *, effects: bool = False
) -> list[bool]:
    """Returns ``needed`` and the carries it depends on over the iterations."""
    num_consts, num_carry = compat.scan_sizes(eqn)
    (body,) = bodies(eqn)
    carry_in = body.invars[num_consts : num_consts + num_carry]
    needed = list(needed)
    while True:
        live = live_vars(body, needed, effects=effects)
        wider = [n or v in live for n, v in zip(needed, carry_in, strict=False)]
        wider += needed[num_carry:]
        if wider == needed:
            return needed
        needed = wider


def live_vars(
    jaxpr: Any,
    needed: Sequence[bool],
    roots: Sequence[Any] = (),
    *,
    effects: bool = False,
    whole: bool = False,
) -> set[Any]:
    """Returns the variables that the ``needed`` outputs and ``roots`` depend on.

    Args:
      jaxpr: flat, without constants.
      needed: for each output, whether it is needed.
      roots: equations whose operands are all needed.
      effects: whether to include what prints depend on, at any depth.
      whole: whether a loop needs all its operands, whichever results are needed.
    """
    live = {v for v, n in zip(jaxpr.outvars, needed, strict=True) if n and is_var(v)}
    pinned = {id(eqn) for eqn in roots}
    for eqn in reversed(jaxpr.eqns):
        mask = [v in live for v in eqn.outvars]
        if id(eqn) in pinned or (whole and any(mask) and not is_barrier(eqn)):
            operands = [True] * len(eqn.invars)
        elif any(mask) or (effects and real_effects(eqn)):
            operands = needed_operands(eqn, mask, effects=effects)
        else:
            continue
        live.update(
            v for v, n in zip(eqn.invars, operands, strict=True) if n and is_var(v)
        )
    return live


def dce(jaxpr: Any) -> Any:
    """Returns ``jaxpr`` without equations whose results are unused; prints stay."""
    effects = {id(eqn) for eqn in jaxpr.eqns if real_effects(eqn)}
    return slice_jaxpr(jaxpr, jaxpr.invars, jaxpr.outvars, effects)


def slice_jaxpr(
    jaxpr: Any, invars: Sequence[Any], outvars: Sequence[Atom], effects: Collection[int]
) -> Any:
    """Returns the equations of ``jaxpr`` that lead from ``invars`` to ``outvars``.

    Args:
      jaxpr: flat, without constants.
      invars: the new inputs; may include variables that ``jaxpr`` computes.
      outvars: the new outputs.
      effects: ids of equations to keep even if nothing reads their results.
    """
    given = set(invars)
    live = {v for v in outvars if is_var(v)} - given
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        mask = [v in live for v in eqn.outvars]
        if id(eqn) not in effects and not any(mask):
            continue
        if is_barrier(eqn):
            eqn = narrow_barrier(eqn, mask)
        elif any(v in given for v in eqn.outvars):
            fresh = [jex_core.Var(v.aval) if v in given else v for v in eqn.outvars]
            eqn = eqn.replace(outvars=fresh)
        eqns.append(eqn)
        live.update(a for a in eqn.invars if is_var(a) and a not in given)
    return compat.new_jaxpr(invars, outvars, eqns[::-1], jaxpr)


def narrow_barrier(eqn: Any, live: Sequence[bool]) -> Any:
    """Drops the operands of an ``optimization_barrier`` with unused results."""
    kept = [i for i, n in enumerate(live) if n]
    return eqn.replace(
        invars=[eqn.invars[i] for i in kept], outvars=[eqn.outvars[i] for i in kept]
    )


def prune(jaxpr: Any) -> tuple[Any, tuple[bool, ...]]:
    """Drops unused inputs; also returns which inputs are used."""
    live = live_vars(jaxpr, [True] * len(jaxpr.outvars), jaxpr.eqns)
    read = tuple(v in live for v in jaxpr.invars)
    invars = [v for v, r in zip(jaxpr.invars, read, strict=True) if r]
    return compat.new_jaxpr(invars, jaxpr.outvars, jaxpr.eqns, jaxpr), read


def avals_of(atoms: Sequence[Atom]) -> list[Any]:
    """Returns the abstract values of operands."""
    return [a.aval for a in atoms]


def map_bodies(eqn: Any, function: Callable[[Any], Any]) -> Any:
    """Applies ``function`` to the bodies of a scan, a cond or a shard_map.

    Bodies are passed unchanged; ``function`` returns an open jaxpr.
    """
    if eqn.primitive.name == "cond":
        branches = tuple(compat.close(function(b)) for b in eqn.params["branches"])
        return eqn.replace(params={**eqn.params, "branches": branches})
    if eqn.primitive.name not in _WITH_BODIES:
        return eqn
    body = run_inside(eqn, lambda: function(eqn.params["jaxpr"]))
    if eqn.primitive.name == "scan":
        body = compat.close(body)  # a shard_map's is open
    return eqn.replace(params={**eqn.params, "jaxpr": body})


def run_inside(eqn: Any, function: Callable[[], Any]) -> Any:
    """Calls ``function`` with the mesh axes of the loop ``eqn`` in scope."""
    if eqn.primitive.name != "shard_map":
        return function()
    found = []
    jax.eval_shape(
        compat.shard_map_like(eqn, lambda: found.append(function()), (), None)
    )
    return found[0]


def barrier_equation(operands: Sequence[Any], results: Sequence[Any]) -> Any:
    """Returns ``results = optimization_barrier(operands)`` over variables."""
    template = jax.make_jaxpr(lambda: jax.lax.optimization_barrier((0, 1)))()
    eqn = template.eqns[-1]
    return eqn.replace(invars=list(operands), outvars=list(results))


def trace(function: Callable[..., Any], avals: Sequence[Any]) -> Any:
    """Traces ``function`` at ``avals`` to a closed jaxpr."""
    return jax.make_jaxpr(function)(*(compat.struct(aval) for aval in avals))
