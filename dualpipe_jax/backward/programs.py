"""The programs F, I, W and B of a function, traced and cut."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from dualpipe_jax import compat
from dualpipe_jax.backward.cut import Policy, Status
from dualpipe_jax.backward.flatten import flatten, join
from dualpipe_jax.backward.fuse import fuse
from dualpipe_jax.backward.interleave import interleave
from dualpipe_jax.backward.jaxprs import prune, trace
from dualpipe_jax.backward.loops import sink, split
from dualpipe_jax.backward.naming import name_weights

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Programs:
    """The programs of a split, as jaxprs over flat lists; holds no arrays.

    ``operands`` below are flat: constants, parameters, residuals.
    """

    f: Any  # constants, params, inputs -> outputs, aux, residuals
    i: Any  # operands, output cotangents -> input cotangents, wgrad_residuals
    w: Any  # those it reads of (operands, wgrad_residuals) -> param cotangents
    b: Any  # operands, output cotangents -> input cotangents, param cotangents
    read_by_w: tuple[bool, ...]  # of (operands, wgrad_residuals)
    in_tree: Any  # of (params, inputs)
    out_tree: Any
    aux_tree: Any  # None without aux
    in_avals: tuple[Any, ...]
    out_avals: tuple[Any, ...]
    residual_avals: tuple[Any, ...]
    wgrad_residual_avals: tuple[Any, ...]
    params_with_cts: tuple[bool, ...]  # of params: floating, and trainable

    def __repr__(self):
        sizes = (f"{n}: {len(getattr(self, n.lower()).eqns)} equations" for n in "FIWB")
        return f"Programs({', '.join(sizes)})"

    @property
    def num_params(self) -> int:
        return len(self.params_with_cts)

    @property
    def num_input_cts(self) -> int:
        """Number of cotangents of the inputs; integers have none."""
        return sum(map(_has_cotangent, self.in_avals[self.num_params :]))

    @property
    def read_by_weights(self) -> tuple[bool, ...]:
        stop = len(self.read_by_w) - len(self.wgrad_residual_avals)
        return self.read_by_w[stop - len(self.residual_avals) : stop]

    def forward(self, consts, params, inputs):
        return self._outputs(
            compat.evaluate(self.f, *self._inputs(consts, params, inputs))
        )

    def _inputs(self, consts, params, inputs):
        params_tree, inputs_tree = self.in_tree.children()
        param_avals = self.in_avals[: self.num_params]
        input_avals = self.in_avals[self.num_params :]
        flat = _flat(params, params_tree, param_avals, "params")
        flat += _flat(inputs, inputs_tree, input_avals, "inputs")
        return [*consts, *flat]

    def _outputs(self, outs):
        outs = iter(outs)
        outputs = jax.tree.unflatten(self.out_tree, _take(outs, self.out_tree))
        if self.aux_tree is not None:
            aux = jax.tree.unflatten(self.aux_tree, _take(outs, self.aux_tree))
            outputs = outputs, aux
        return outputs, tuple(map(_to_storage, outs))

    @functools.cached_property
    def _pairs(self) -> dict[Programs, Any]:
        return {}

    def pair(self, other: Programs) -> Any:
        """Returns F and B of another, interleaved; None as for `interleave`."""
        if other not in self._pairs:
            self._pairs[other] = interleave(self.f, other.b, other.num_input_cts)
        return self._pairs[other]

    def forward_and_backward(self, consts, forward, other, other_consts, backward):
        """Runs F on (params, inputs) and B of other on (params, residuals, cts)."""
        params, residuals, cts = backward
        operands = other.operands(other_consts, params, residuals)
        pair = self.pair(other)
        if pair is None:
            return self.forward(consts, *forward), other.backward(operands, cts)
        args = [*self._inputs(consts, *forward), *operands, *other._cotangents(cts)]
        outs = compat.evaluate(pair, *args)
        num = len(self.f.outvars)
        return self._outputs(outs[:num]), other._all_cts(outs[num:])

    def operands(self, consts, params, residuals):
        params_tree = self.in_tree.children()[0]
        flat = _flat(params, params_tree, self.in_avals[: self.num_params], "params")
        stored = _from_storage(residuals, self.residual_avals, "residuals")
        return [*consts, *flat, *stored]

    def backward_input(self, operands, output_cts):
        cts = self._cotangents(output_cts)
        outs = compat.evaluate(self.i, *operands, *cts)
        num = len(outs) - len(self.wgrad_residual_avals)
        return self._input_cts(outs[:num]), tuple(map(_to_storage, outs[num:]))

    def backward_weights(self, operands, wgrad_residuals):
        wgrad_residuals = _from_storage(
            wgrad_residuals, self.wgrad_residual_avals, "wgrad_residuals"
        )
        read = zip([*operands, *wgrad_residuals], self.read_by_w, strict=True)
        return self._param_cts(compat.evaluate(self.w, *(x for x, r in read if r)))

    def backward(self, operands, output_cts):
        cts = self._cotangents(output_cts)
        return self._all_cts(compat.evaluate(self.b, *operands, *cts))

    def _all_cts(self, outs):
        num = self.num_input_cts
        return self._param_cts(outs[num:]), self._input_cts(outs[:num])

    # What split_vjp returns: `saved` holds the residuals that W reads.

    def kept_until_weights(self, operands):
        stop = len(operands) - len(self.residual_avals)
        read = zip(operands[:stop], self.read_by_w, strict=False)
        return [x for x, r in read if r]

    def start(self, operands, output_cts):
        input_cts, wgrad_residuals = self.backward_input(operands, output_cts)
        residuals = operands[len(operands) - len(self.residual_avals) :]
        read = zip(residuals, self.read_by_weights, strict=True)
        return input_cts, (*(_to_storage(x) for x, r in read if r), *wgrad_residuals)

    def finish(self, kept, saved):
        read = zip(self.residual_avals, self.read_by_weights, strict=True)
        residual_avals = [aval for aval, r in read if r]
        values = _from_storage(
            saved, [*residual_avals, *self.wgrad_residual_avals], "saved"
        )
        num, stop = (
            len(residual_avals),
            len(self.read_by_w) - len(self.wgrad_residual_avals),
        )
        crossed = zip(values[num:], self.read_by_w[stop:], strict=True)
        args = [*kept, *values[:num], *(x for x, r in crossed if r)]
        return self._param_cts(compat.evaluate(self.w, *args))

    def _cotangents(self, output_cts):
        avals = [aval if _has_cotangent(aval) else None for aval in self.out_avals]
        flat = _flat(output_cts, self.out_tree, avals, "output_cts")
        return [x for x, aval in zip(flat, avals, strict=True) if aval is not None]

    def _input_cts(self, flat):
        avals = self.in_avals[self.num_params :]
        full = _with_float0(avals, map(_has_cotangent, avals), flat)
        return jax.tree.unflatten(self.in_tree.children()[1], full)

    def _param_cts(self, flat):
        avals = self.in_avals[: self.num_params]
        full = _with_float0(avals, self.params_with_cts, flat)
        return jax.tree.unflatten(self.in_tree.children()[0], full)


def trace_programs(
    fn, params, inputs, has_aux, early_reductions, platform=None, trainable=None
):
    """Returns (programs, constants)."""
    in_avals = _avals((params, inputs))
    in_tree = jax.tree.structure((params, inputs))
    num_params = jax.tree.structure(params).num_leaves
    with_cts = _params_with_cts(in_avals[:num_params], trainable)
    record = {}

    def forward(*flat):
        params, inputs = jax.tree.unflatten(in_tree, flat)
        call, trained = _of_trained(_checked_function(fn, has_aux), params, with_cts)
        outputs, pullback, *aux = jax.vjp(call, trained, *inputs, has_aux=has_aux)
        record["out"] = jax.tree.structure(outputs)
        record["aux"] = jax.tree.structure(aux[0]) if has_aux else None
        saved, record["pullback"] = jax.tree.flatten(pullback)
        return jax.tree.leaves((outputs, aux, saved))

    def backward(*flat):
        saved, cts = flat[:num_saved], flat[num_saved:]
        pullback = jax.tree.unflatten(record["pullback"], saved)
        full = _with_float0(out_avals, map(_has_cotangent, out_avals), cts)
        param_cts, *input_cts = pullback(jax.tree.unflatten(record["out"], full))
        leaves = jax.tree.leaves((input_cts, param_cts))
        return [ct for ct in leaves if ct.dtype != dtypes.float0]

    f, f_consts = flatten(
        trace(forward, in_avals),
        # A known platform means that no further transformations follow.
        inline_custom=platform is not None,
        platform=platform,
    )
    num_kept = sum(
        record[k].num_leaves for k in ("out", "aux") if record[k] is not None
    )
    out_avals = tuple(v.aval for v in f.outvars[: record["out"].num_leaves])
    saved_avals = [v.aval for v in f.outvars[num_kept:]]
    num_saved = len(saved_avals)
    ct_avals = [aval for aval in out_avals if _has_cotangent(aval)]
    b, b_consts = flatten(
        trace(backward, [*saved_avals, *ct_avals]),
        inline_custom=True,
        platform=platform,
    )
    joint, late = join(f, b, len(f_consts), len(b_consts), num_kept)
    consts = (*f_consts, *b_consts)

    both = [Status.CONSTANT] * len(consts) + [Status.STATIC] * num_params
    early = [Status.EARLY] * (len(in_avals) - num_params)
    step = split(
        joint,
        [*both, *early, *[Status.LATE] * len(ct_avals)],
        [i < num_kept for i in range(len(joint.outvars))],
        Policy(late_heavy=False),
        late_equations=late,
    )
    num_input_cts = sum(map(_has_cotangent, in_avals[num_params:]))
    whole = sink(step.late)
    is_input_ct = [i < num_input_cts for i in range(len(whole.outvars))]
    whole = name_weights(whole, is_input_ct)
    free = [Status.FREE] * len(step.crossing)
    halves = split(
        whole,
        [*both, *free, *[Status.EARLY] * len(ct_avals)],
        is_input_ct,
        Policy(late_heavy=True, early_reductions=early_reductions),
    )
    w, read_by_w = prune(fuse(halves.late))
    programs = Programs(
        f=step.early,
        i=halves.early,
        w=w,
        b=whole,
        read_by_w=read_by_w,
        in_tree=in_tree,
        out_tree=record["out"],
        aux_tree=record["aux"],
        in_avals=in_avals,
        out_avals=out_avals,
        residual_avals=tuple(v.aval for v in step.crossing),
        wgrad_residual_avals=tuple(v.aval for v in halves.crossing),
        params_with_cts=with_cts,
    )
    return programs, consts


def _avals(args: PyTree) -> tuple[Any, ...]:
    avals = []
    for path, leaf in jax.tree.leaves_with_path(args):
        kind = "params" if path[0].idx == 0 else "inputs"
        where = kind + jax.tree_util.keystr(path[1:])
        avals.append(_aval(leaf, where, "pass arrays, or jax.ShapeDtypeStruct"))
    return tuple(avals)


def _checked_function(fn, has_aux):
    """Returns ``fn`` with errors that name the wrong result."""

    def checked(*args):
        result = fn(*args)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(
                f"fn must return a pair (outputs, aux) with {has_aux=}; return one, or "
                "leave has_aux out."
            )
        for path, leaf in jax.tree.leaves_with_path(result):
            where = "fn(...)" + jax.tree_util.keystr(path)
            _aval(leaf, where, "return arrays only")
        return result

    return checked


def _aval(x: Any, name: str, remedy: str) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.make_jaxpr(lambda x: x)(x).in_avals[0]
    try:
        aval = jax.typeof(x)
    except TypeError:
        aval = None
    if aval is None or compat.is_ref(aval):
        got = repr(x) if aval is None else aval.str_short()
        raise ValueError(f"{name} must be an array, got {got}; {remedy}.")
    return aval


def _has_cotangent(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, np.inexact)


def _params_with_cts(
    avals: Sequence[Any], trainable: Sequence[bool] | None
) -> tuple[bool, ...]:
    """Returns for each parameter whether W computes its cotangent."""
    if trainable is None:
        trainable = [True] * len(avals)
    if len(trainable) != len(avals):
        raise ValueError(
            f"{trainable=} must have one entry for each of the {len(avals)} leaves of "
            "params."
        )
    return tuple(
        wanted and _has_cotangent(aval)
        for aval, wanted in zip(avals, trainable, strict=True)
    )


def _of_trained(fn, params: PyTree, with_cts: Sequence[bool]):
    """Returns ``fn`` as a function of those leaves of params, and these leaves."""
    leaves, treedef = jax.tree.flatten(params)

    def call(trained, *inputs):
        given = iter(trained)
        merged = [
            next(given) if has_ct else leaf
            for leaf, has_ct in zip(leaves, with_cts, strict=True)
        ]
        return fn(jax.tree.unflatten(treedef, merged), *inputs)

    return call, [x for x, has_ct in zip(leaves, with_cts, strict=True) if has_ct]


def _with_float0(
    avals: Sequence[Any], has_ct: Iterable[bool], cotangents: Sequence[Any]
) -> list[Any]:
    """Puts float0 zeros where there is no cotangent, as ``jax.vjp`` does."""
    given = iter(cotangents)
    return [
        next(given) if has else np.zeros(aval.shape, dtypes.float0)
        for aval, has in zip(avals, has_ct, strict=True)
    ]


def _take(values, tree: Any) -> list[Any]:
    return [next(values) for _ in range(tree.num_leaves)]


def _flat(value: PyTree, tree: Any, avals: Sequence[Any], name: str) -> list[Any]:
    """Returns the leaves of ``value``, checked against ``avals`` (None: not checked).

    They are returned varying over the same mesh axes as in the trace.
    """
    leaves, actual = jax.tree_util.tree_flatten_with_path(value)
    if actual != tree:
        raise ValueError(
            f"{name} must have the structure of the trace, {tree}, got {actual}; trace "
            "another plan for it."
        )
    flat = []
    for (path, x), aval in zip(leaves, avals, strict=True):
        if aval is not None:
            where = name + jax.tree_util.keystr(path)
            given = _aval(x, where, "pass arrays")
            if (given.shape, given.dtype) != (aval.shape, aval.dtype):
                raise ValueError(
                    f"{where} must be {aval.str_short()} as traced, got "
                    f"{given.str_short()}; cast or reshape it, or trace another plan."
                )
            x = compat.vary_like(x, aval)
        flat.append(x)
    return flat


def _is_key(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, dtypes.prng_key)


def _to_storage(x: Any) -> Any:
    """Returns random keys as their bits, so that any buffer can hold them."""
    return jax.random.key_data(x) if _is_key(jax.typeof(x)) else x


def storage_struct(aval: Any) -> jax.ShapeDtypeStruct:
    """Returns the struct that a value is stored as; random keys as their data."""
    struct = compat.struct(aval)
    return jax.eval_shape(jax.random.key_data, struct) if _is_key(aval) else struct


def _from_storage(values: Sequence[Any], avals: Sequence[Any], name: str) -> list[Any]:
    values = tuple(values)
    if len(values) != len(avals):
        raise ValueError(
            f"{name} must hold {len(avals)} arrays, got {len(values)}; pass what the "
            "previous step returned."
        )
    stored = [_storage_aval(aval) for aval in avals]
    flat = _flat(values, jax.tree.structure(values), stored, name)
    return [
        jax.random.wrap_key_data(x, impl=compat.key_impl(aval)) if _is_key(aval) else x
        for x, aval in zip(flat, avals, strict=True)
    ]


def _storage_aval(aval: Any) -> Any:
    return _aval(storage_struct(aval), "", "") if _is_key(aval) else aval
