"""Splits conds and shard_maps in two, as ``scans`` does for scans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.sharding import PartitionSpec

from dualpipe_jax import compat
from dualpipe_jax.backward.cut import Cut, Status
from dualpipe_jax.backward.flatten import Builder
from dualpipe_jax.backward.jaxprs import (
    avals_of,
    bodies,
    dce,
    live_vars,
    nbytes,
    prune,
    run_inside,
    trace,
)
from dualpipe_jax.backward.scans import Piece


class CondSplit:
    """The two conds that a cond is split into; arguments as in ``ScanSplit``.

    Each branch has its own crossing values: values of the same type share a slot, and a
    branch with fewer values fills the remaining slots with zeros.
    """

    def __init__(
        self,
        eqn: Any,
        early: Sequence[bool],
        live: Sequence[bool],
        status: Sequence[Status],
        split: Callable[..., Cut],
    ):
        kept = [i for i, n in enumerate(live) if n]
        self.early_outputs = [i for i in kept if early[i]]
        self.late_outputs = self.computed_late = [i for i in kept if not early[i]]
        self._eqn, self._operands = eqn, eqn.invars
        self._branches = []
        for body in bodies(eqn):
            outvars = [body.outvars[i] for i in kept]
            part = compat.new_jaxpr(body.invars, outvars, body.eqns, body)
            cut = split(
                part, status[1:], [early[i] for i in kept], lambda v: nbytes(v.aval)
            )
            self._branches.append((body.invars, cut))
        self._emitted = [
            [v for v in cut.crossing if v not in invars]
            for invars, cut in self._branches
        ]
        most: Counter[Any] = Counter()
        for emitted in self._emitted:
            most |= Counter(v.aval for v in emitted)
        self._slots = list(most.elements())

    def early(self) -> Piece:
        """Returns the early cond: early results, then the slots."""
        num = len(self.early_outputs)
        used = self._used([cut.early for _, cut in self._branches])

        def branch(index):
            invars, cut = self._branches[index]
            assigned = self._assign(index)

            def run(*values):
                env = dict(zip((invars[i] for i in used), values, strict=True))
                body, _ = prune(cut.early)
                outs = compat.evaluate(body, *(env[v] for v in body.invars))
                crossing = dict(zip(cut.crossing, outs[num:], strict=True))
                slots = [
                    compat.zeros(aval) if v is None else crossing[v]
                    for v, aval in zip(assigned, self._slots, strict=True)
                ]
                return outs[:num], slots

            return run

        return self._piece(branch, used, [])

    def late(self, crossing: Sequence[Any]) -> tuple[Piece, dict[int, Any]]:
        """Returns the late cond, given the slots."""
        used = self._used([cut.late for _, cut in self._branches])

        def branch(index):
            invars, cut = self._branches[index]
            assigned = self._assign(index)

            def run(*values):
                env = dict(zip((invars[i] for i in used), values, strict=False))
                slots = zip(assigned, values[len(used) :], strict=True)
                env |= {v: value for v, value in slots if v is not None}
                body, _ = prune(cut.late)
                return compat.evaluate(body, *(env[v] for v in body.invars))

            return run

        return self._piece(branch, used, crossing), {}

    def _assign(self, index: int) -> list[Any]:
        """Returns the variable of a branch that each slot holds, or None."""
        waiting = list(self._emitted[index])
        assigned = []
        for aval in self._slots:
            found = next((v for v in waiting if v.aval == aval), None)
            if found is not None:
                waiting.remove(found)
            assigned.append(found)
        return assigned

    def _used(self, parts: Sequence[Any]) -> list[int]:
        used = set()
        for (invars, _), body in zip(self._branches, parts, strict=True):
            live = live_vars(body, [True] * len(body.outvars), body.eqns)
            used |= {i for i, v in enumerate(invars) if v in live}
        return sorted(used)

    def _piece(
        self, branch: Callable, used: Sequence[int], slots: Sequence[Any]
    ) -> Piece:
        operands = [*(self._operands[1 + i] for i in used), *slots]
        branches = [branch(i) for i in range(len(self._branches))]
        return lambda builder: append_cond(builder, self._eqn, branches, operands)


def append_cond(
    builder: Builder,
    eqn: Any,
    branches: Sequence[Callable[..., Any]],
    operands: Sequence[Any],
) -> list[Any]:
    """Appends a cond on the same index as ``eqn``; returns its results.

    Operands that no branch reads are dropped. (``lax.switch`` would clamp the index
    again each time, which would hide that several conds share one index.)
    """
    like = bodies(eqn)[0]
    flat = []
    for branch in branches:
        inner = Builder()
        closed = trace(
            lambda *xs, f=branch: jax.tree.leaves(f(*xs)), avals_of(operands)
        )
        invars = [jex_core.Var(a.aval) for a in operands]
        outs = inner.inline_closed(closed, invars)
        flat.append(dce(compat.new_jaxpr(invars, outs, inner.eqns, like)))
    lives = [live_vars(b, [True] * len(b.outvars)) for b in flat]
    used = [
        i
        for i in range(len(operands))
        if any(b.invars[i] in live for b, live in zip(flat, lives, strict=True))
    ]
    flat = [
        compat.new_jaxpr([b.invars[i] for i in used], b.outvars, b.eqns, b)
        for b in flat
    ]
    results = [jex_core.Var(v.aval) for v in flat[0].outvars]
    builder.eqns.append(
        eqn.replace(
            invars=[eqn.invars[0], *(operands[i] for i in used)],
            outvars=results,
            params={**eqn.params, "branches": tuple(map(compat.close, flat))},
            effects=set().union(*(b.effects for b in flat)),
        )
    )
    return results


class ShardMapSplit:
    """The two shard_maps that a shard_map is split into; arguments as in ``ScanSplit``.

    Crossing values are stacked over the mesh axes that they vary over, so that no
    device sends anything.
    """

    def __init__(
        self,
        eqn: Any,
        early: Sequence[bool],
        live: Sequence[bool],
        status: Sequence[Status],
        split: Callable[..., Cut],
    ):
        kept = [i for i, n in enumerate(live) if n]
        self.early_outputs = [i for i in kept if early[i]]
        self.late_outputs = self.computed_late = [i for i in kept if not early[i]]
        (body,) = bodies(eqn)
        self._eqn = eqn
        self._operands = dict(zip(body.invars, eqn.invars, strict=True))
        self._in_specs = dict(zip(body.invars, eqn.params["in_specs"], strict=True))
        outvars = [body.outvars[i] for i in kept]
        part = compat.new_jaxpr(body.invars, outvars, body.eqns, body)
        early_outputs = [early[i] for i in kept]
        self._cut = run_inside(
            eqn, lambda: split(part, status, early_outputs, lambda v: nbytes(v.aval))
        )
        self._emitted = [v for v in self._cut.crossing if v not in self._operands]
        self._specs = {v: self._spec(v.aval) for v in self._emitted}

    def early(self) -> Piece:
        """Returns the early shard_map: early results, then crossing values."""
        num = len(self.early_outputs)
        body, _ = prune(self._cut.early)
        out_specs = [self._eqn.params["out_specs"][i] for i in self.early_outputs]

        def run(*values):
            outs = compat.evaluate(body, *values)
            crossing = dict(zip(self._cut.crossing, outs[num:], strict=True))
            return outs[:num], [
                crossing[v][None] if self._specs[v] else crossing[v]
                for v in self._emitted
            ]

        return self._piece(
            run,
            [self._in_specs[v] for v in body.invars],
            (out_specs, [self._specs[v] for v in self._emitted]),
            [self._operands[v] for v in body.invars],
        )

    def late(self, crossing: Sequence[Any]) -> tuple[Piece, dict[int, Any]]:
        """Returns the late shard_map."""
        operands = self._operands | dict(zip(self._emitted, crossing, strict=True))
        body, _ = prune(self._cut.late)
        specs = self._in_specs | self._specs

        def run(*values):
            args = [
                x[0] if self._specs.get(v) else x
                for v, x in zip(body.invars, values, strict=True)
            ]
            return compat.evaluate(body, *args)

        return self._piece(
            run,
            [specs[v] for v in body.invars],
            [self._eqn.params["out_specs"][i] for i in self.late_outputs],
            [operands[v] for v in body.invars],
        ), {}

    def _spec(self, aval: Any) -> PartitionSpec:
        params = self._eqn.params
        axes = [
            name
            for name in params["mesh"].axis_names
            if name in compat.manual_axes(self._eqn)
            and (not params["check_vma"] or name in compat.varying_axes(aval))
        ]
        return PartitionSpec(tuple(axes)) if axes else PartitionSpec()

    def _piece(self, run, in_specs, out_specs, operands) -> Piece:
        mapped = compat.shard_map_like(self._eqn, run, tuple(in_specs), out_specs)

        def flat(*values):
            return jax.tree.leaves(mapped(*values))

        return lambda builder: builder.inline_closed(
            trace(flat, avals_of(operands)), operands
        )
