"""Splits a scan in two: one for the early program, one for the late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from dualpipe_jax import compat
from dualpipe_jax.backward.cut import Cut, Status
from dualpipe_jax.backward.flatten import Builder
from dualpipe_jax.backward.jaxprs import (
    bodies,
    is_var,
    live_vars,
    nbytes,
    scan_closure,
    trace,
)

# Appends equations to a builder and returns their results.
Piece = Callable[[Builder], list[Any]]


class Scan:
    """A scan equation taken apart."""

    def __init__(self, eqn: Any):
        num_consts, num_carry = compat.scan_sizes(eqn)
        stop = num_consts + num_carry
        self.eqn = eqn
        (self.body,) = bodies(eqn)
        self.num_carry = num_carry
        self.consts = eqn.invars[:num_consts]
        self.init = eqn.invars[num_consts:stop]
        self.xs = eqn.invars[stop:]
        self.const_vars = self.body.invars[:num_consts]
        self.carry_vars = self.body.invars[num_consts:stop]
        self.x_vars = self.body.invars[stop:]
        self.length = eqn.params["length"]

    def run(self, step: Callable, init: Any, xs: Any) -> tuple[Any, Any]:
        """Runs another body in this scan's direction and length."""
        return lax.scan(
            step,
            init,
            xs,
            length=self.length,
            reverse=self.eqn.params["reverse"],
            unroll=self.eqn.params["unroll"],
        )


class ScanSplit:
    """The two scans that a scan is split into.

    Args:
      eqn: the scan.
      early: for each result, whether the early scan computes it.
      live: for each result, whether anything reads it.
      status: where each operand is available.
      split: cuts a body: (jaxpr, status, early outputs, price) -> Cut.
    """

    def __init__(
        self,
        eqn: Any,
        early: Sequence[bool],
        live: Sequence[bool],
        status: Sequence[Status],
        split: Callable[..., Cut],
    ):
        self.scan = scan = Scan(eqn)
        early = scan_closure(eqn, early)
        live = scan_closure(eqn, live, effects=True)
        kept = [i for i, n in enumerate(live) if n]
        self.early_outputs = [i for i in kept if early[i]]
        self.late_outputs = [i for i in kept if not early[i]]
        start = len(scan.consts)
        status = list(status)
        status[start : start + scan.num_carry] = [
            Status.EARLY if e else Status.LATE for e in early[: scan.num_carry]
        ]
        outvars = [scan.body.outvars[i] for i in kept]
        body = compat.new_jaxpr(scan.body.invars, outvars, scan.body.eqns, scan.body)
        once = set(scan.const_vars)

        def price(var):
            return nbytes(var.aval) * (1 if var in once else scan.length)

        parts = split(body, status, [early[i] for i in kept], price)
        self._early_body, self._late_body = parts.early, parts.late
        self._crossing = parts.crossing
        self._stacked = dict(zip(scan.x_vars, scan.xs, strict=True))
        self._const = dict(zip(scan.const_vars, scan.consts, strict=True))
        self._emitted = [
            v for v in parts.crossing if v not in self._stacked and v not in self._const
        ]

    def early(self) -> Piece:
        """Returns the early scan: early results, then crossing values, stacked."""
        body, num = self._early_body, len(self.early_outputs)
        crossing = dict(zip(self._crossing, body.outvars[num:], strict=True))
        outvars = body.outvars[:num] + [crossing[v] for v in self._emitted]
        body = compat.new_jaxpr(body.invars, outvars, body.eqns, body)
        return self._piece(body, self.early_outputs, self._stacked)

    def late(self, crossing: Sequence[Any]) -> tuple[Piece | None, dict[int, Any]]:
        """Returns the late scan and the late results that exist without it."""
        stacked = self._stacked | dict(zip(self._emitted, crossing, strict=True))
        body = self._late_body
        outs = dict(zip(self.late_outputs, body.outvars, strict=True))
        present = {
            i: stacked[atom]
            for i, atom in outs.items()
            if i >= self.scan.num_carry and is_var(atom) and atom in stacked
        }
        self.computed_late = [i for i in self.late_outputs if i not in present]
        if not self.computed_late:
            return None, present
        outvars = [outs[i] for i in self.computed_late]
        body = compat.new_jaxpr(body.invars, outvars, body.eqns, body)
        return self._piece(body, self.computed_late, stacked), present

    def _piece(self, body: Any, outputs: Sequence[int], stacked: dict) -> Piece:
        scan = self.scan
        carried = [i for i in outputs if i < scan.num_carry]
        used = live_vars(body, [True] * len(body.outvars), body.eqns)
        consts = [v for v in body.invars if v in used and v in self._const]
        xs = [v for v in body.invars if v in used and v in stacked]
        carry = [scan.carry_vars[i] for i in carried]
        operands = [
            *(self._const[v] for v in consts),
            *(scan.init[i] for i in carried),
            *(stacked[v] for v in xs),
        ]
        avals = [v.aval for v in (*consts, *carry)] + [stacked[v].aval for v in xs]
        body = compat.new_jaxpr([*consts, *carry, *xs], body.outvars, body.eqns, body)
        start, stop = len(consts), len(consts) + len(carry)

        def run(*values):
            def step(carry, x):
                outs = compat.evaluate(body, *values[:start], *carry, *x)
                return outs[: len(carry)], outs[len(carry) :]

            init, xs = list(values[start:stop]), list(values[stop:])
            carry, ys = scan.run(step, init, xs)
            return [*carry, *ys]

        return lambda builder: builder.inline_closed(trace(run, avals), operands)
