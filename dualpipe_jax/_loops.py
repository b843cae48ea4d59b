"""Splits loops and branches so that each belongs to one program only.

A scan over layers computes both what the early program returns and what only the late
one needs. It becomes two scans: the first emits, once per iteration, the values that
cross (a minimum cut of its body, with nested loops split in turn), and the second reads
them. A ``cond`` becomes two conds likewise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax import lax

from dualpipe_jax import compat
from dualpipe_jax._cut import Cut, Policy, Status, cut
from dualpipe_jax._jaxprs import (
    Builder,
    Kind,
    bodies,
    is_var,
    kind,
    live_vars,
    nbytes,
    scan_closure,
    trace,
)


def split(
    jaxpr: Any,
    status: Sequence[Status],
    early_outputs: Sequence[bool],
    policy: Policy,
    *,
    late_equations: Collection[int] = (),
    price: Callable[[Any], float] | None = None,
) -> Cut:
    """Cuts ``jaxpr`` as ``_cut.cut`` does, after splitting its loops and branches."""
    needed = live_vars(jaxpr, early_outputs)
    live = live_vars(jaxpr, [True] * len(jaxpr.outvars))

    def choose(eqn):
        if id(eqn) in late_equations:
            return None
        early = [v in needed for v in eqn.outvars]
        return early, [v in live for v in eqn.outvars]

    splitter = _Splitter(jaxpr, status, policy, late_equations, choose)
    jaxpr, late_equations = splitter.run()
    return cut(
        jaxpr, status, early_outputs, policy, late_equations=late_equations, price=price
    )


def sink(jaxpr: Any, status: Sequence[Status]) -> Any:
    """Computes cheap per-iteration values in the scan that reads them.

    JAX's recomputing scans (remat) emit every value that their backward scan reads,
    elementwise ones included. Here only what is expensive to recompute is emitted.
    """
    aligned = _read_by_scans_only(jaxpr)
    live = live_vars(jaxpr, [True] * len(jaxpr.outvars))

    def choose(eqn):
        if eqn.primitive.name != "scan":
            return None
        alive = [v in live for v in eqn.outvars]
        early = [
            n and v not in aligned for v, n in zip(eqn.outvars, alive, strict=True)
        ]
        return early, alive

    splitter = _Splitter(jaxpr, status, Policy(late_heavy=False), (), choose, free=True)
    return fuse(splitter.run()[0])


def _read_by_scans_only(jaxpr: Any) -> set[Any]:
    """Returns scan outputs that are read only as per-iteration inputs of scans."""
    length: dict[Any, int] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            _, num_carry = compat.scan_sizes(eqn)
            length |= dict.fromkeys(eqn.outvars[num_carry:], eqn.params["length"])
    barred = {v for v in jaxpr.outvars if is_var(v)}
    for eqn in jaxpr.eqns:
        start = len(eqn.invars)
        if eqn.primitive.name == "scan":
            start = sum(compat.scan_sizes(eqn))
        barred |= {a for a in eqn.invars[:start] if is_var(a)}
        for atom in eqn.invars[start:]:
            if is_var(atom) and length.get(atom) != eqn.params["length"]:
                barred.add(atom)
    return set(length) - barred


def fuse(jaxpr: Any) -> Any:
    """Runs scans that carry nothing and are cheap inside the scans that read them."""
    aligned = _read_by_scans_only(jaxpr)
    producers: dict[Any, tuple[Any, int]] = {}
    builder = Builder()
    env: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=[_read(env, a) for a in eqn.invars])
        if eqn.primitive.name != "scan":
            builder.eqns.append(eqn)
            continue
        _, num_carry = compat.scan_sizes(eqn)
        if any(is_var(a) and a in producers for a in eqn.invars):
            results = _fuse_into(builder, eqn, producers)
            env.update(zip(eqn.outvars, results, strict=True))
        elif (
            num_carry == 0
            and kind(eqn) < Kind.HEAVY
            and all(v in aligned for v in eqn.outvars)
        ):
            producers |= {v: (eqn, i) for i, v in enumerate(eqn.outvars)}
        else:
            builder.eqns.append(eqn)
    outs = [_read(env, a) for a in jaxpr.outvars]
    return compat.new_jaxpr(jaxpr.invars, outs, builder.eqns, jaxpr)


def _fuse_into(
    builder: Builder, eqn: Any, producers: dict[Any, tuple[Any, int]]
) -> list[Any]:
    scan = _Scan(eqn)
    used = {id(producers[a][0]): producers[a][0] for a in scan.xs if a in producers}
    sources = [_Scan(producer) for producer in used.values()]
    consts = [a for s in sources for a in s.consts]
    xs = [a for s in sources for a in s.xs]
    own_xs = [a for a in scan.xs if a not in producers]
    operands = [*consts, *xs, *scan.consts, *scan.init, *own_xs]
    avals = [a.aval for a in operands]

    def fused(*values):
        given = iter(values)

        def take(n):
            return [next(given) for _ in range(n)]

        source_consts = [take(len(s.consts)) for s in sources]
        source_xs = [take(len(s.xs)) for s in sources]
        own_consts, init = take(len(scan.consts)), take(len(scan.init))

        def step(carry, x):
            source_x, own_x = x
            made = {}
            for s, c, each in zip(sources, source_consts, source_x, strict=True):
                results = compat.evaluate(s.body, *c, *each)
                made |= dict(zip(s.eqn.outvars, results, strict=True))
            own = iter(own_x)
            mine = [made[a] if a in producers else next(own) for a in scan.xs]
            outs = compat.evaluate(scan.body, *own_consts, *carry, *mine)
            return outs[: len(init)], outs[len(init) :]

        carry, ys = scan.run(step, init, (source_xs, take(len(own_xs))))
        return [*carry, *ys]

    return builder.inline_closed(trace(fused, avals), operands)


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return env.get(atom, atom) if is_var(atom) else atom


class _Scan:
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
        params = self.eqn.params
        return lax.scan(
            step,
            init,
            xs,
            length=self.length,
            reverse=params["reverse"],
            unroll=params["unroll"],
        )


@dataclasses.dataclass
class _Splitter:
    """Rewrites the loops and branches of one jaxpr.

    Attributes:
      choose: for an equation, (early results, live results), or None to leave it.
      free: whether operands of a loop are available to both of its halves.
    """

    jaxpr: Any
    status: Sequence[Status]
    policy: Policy
    late_equations: Collection[int]
    choose: Callable[[Any], tuple[list[bool], list[bool]] | None]
    free: bool = False

    def run(self) -> tuple[Any, frozenset[int]]:
        """Returns the new jaxpr and the ids of its equations that must run late."""
        self.eqns: list[Any] = []
        self.env: dict[Any, Any] = {}
        self.known = dict(zip(self.jaxpr.invars, self.status, strict=True))
        self.late: set[int] = set()
        for eqn in self.jaxpr.eqns:
            choice = None
            if eqn.primitive.name in ("scan", "cond"):
                choice = self.choose(eqn)
            new = eqn.replace(invars=[_read(self.env, a) for a in eqn.invars])
            if choice is None or choice[0] == choice[1] or not any(choice[0]):
                self._keep(new, late=id(eqn) in self.late_equations)
                continue
            split_one = (
                self._split_scan if eqn.primitive.name == "scan" else self._split_cond
            )
            results = split_one(new, *choice)
            self.env.update(
                (v, r)
                for v, r in zip(eqn.outvars, results, strict=True)
                if r is not None
            )
        outs = [_read(self.env, a) for a in self.jaxpr.outvars]
        jaxpr = compat.new_jaxpr(self.jaxpr.invars, outs, self.eqns, self.jaxpr)
        return jaxpr, frozenset(self.late)

    def _keep(self, eqn: Any, late: bool) -> None:
        self.eqns.append(eqn)
        if late:
            self.late.add(id(eqn))
        operands = {self._status_of(a) for a in eqn.invars}
        cheap = kind(eqn) is Kind.CHEAP
        if late or Status.LATE in operands:
            result = Status.LATE
        elif operands <= {Status.STATIC} and kind(eqn) < Kind.HEAVY:
            result = Status.STATIC
        elif operands <= {Status.STATIC, Status.FREE} and cheap:
            result = Status.FREE
        else:
            result = Status.EARLY
        self.known |= dict.fromkeys(eqn.outvars, result)

    def _status_of(self, atom: Any) -> Status:
        return self.known[atom] if is_var(atom) else Status.STATIC

    def _body_status(self, atom: Any) -> Status:
        status = self._status_of(atom)
        return Status.FREE if self.free and status is Status.EARLY else status

    def _append(
        self, function: Callable, operands: Sequence[Any], avals: Any, late: bool
    ) -> list[Any]:
        builder = Builder()
        outs = builder.inline_closed(trace(function, avals), operands)
        for eqn in builder.eqns:
            self._keep(eqn, late)
        return outs

    def _split_scan(self, eqn, early, live):
        scan = _Scan(eqn)
        early = scan_closure(eqn, early)
        live = scan_closure(eqn, live)
        num_carry = scan.num_carry
        status = dict(zip(scan.const_vars, map(self._body_status, scan.consts)))
        status |= {
            v: Status.EARLY if e else Status.LATE
            for v, e in zip(scan.carry_vars, early, strict=False)
        }
        status |= dict(zip(scan.x_vars, map(self._body_status, scan.xs)))
        once = set(scan.const_vars)
        kept = [i for i, n in enumerate(live) if n]
        body = compat.new_jaxpr(
            scan.body.invars,
            [scan.body.outvars[i] for i in kept],
            scan.body.eqns,
            scan.body,
        )
        parts = split(
            body,
            [status[v] for v in body.invars],
            [early[i] for i in kept],
            self.policy,
            price=lambda v: nbytes(v.aval) * (1 if v in once else scan.length),
        )
        halves = _ScanHalves(scan, parts, kept, early)
        first = self._append(*halves.early(), late=False)
        results: list[Any] = [None] * len(live)
        for i, atom in zip(halves.early_outputs, first, strict=False):
            results[i] = atom
        stacks = first[len(halves.early_outputs) :]
        if halves.late_outputs:
            function, operands, avals = halves.late(stacks)
            second = self._append(function, operands, avals, late=not self.free)
            for i, atom in zip(halves.computed_late, second, strict=True):
                results[i] = atom
            for i, atom in halves.passed_through(stacks).items():
                results[i] = atom
        del num_carry
        return results

    def _split_cond(self, eqn, early, live):
        raise NotImplementedError


class _ScanHalves:
    """The two scans that a split body makes."""

    def __init__(self, scan: _Scan, parts: Cut, kept: list[int], early: list[bool]):
        self.scan = scan
        self.early_outputs = [i for i in kept if early[i]]
        self.late_outputs = [i for i in kept if not early[i]]
        operand = dict(zip(scan.const_vars, scan.consts))
        operand |= dict(zip(scan.x_vars, scan.xs))
        self.operand = operand
        self.init = dict(zip(scan.carry_vars, scan.init))
        self.early_body = parts.early
        self.late_body = parts.late
        self.crossing = parts.crossing
        self.emitted = [v for v in parts.crossing if v not in operand]

    def early(self):
        """Returns (function, operands, avals) of the scan that runs early."""
        body = self.early_body
        num_early = len(self.early_outputs)
        extra = [
            num_early + i for i, v in enumerate(self.crossing) if v in self.emitted
        ]
        outvars = body.outvars[:num_early] + [body.outvars[i] for i in extra]
        body = compat.new_jaxpr(body.invars, outvars, body.eqns, body)
        carry = [i for i in self.early_outputs if i < self.scan.num_carry]
        return self._scan(body, [self.scan.carry_vars[i] for i in carry], {})

    def late(self, stacks: Sequence[Any]):
        """Returns the same for the scan that runs late, given the emitted stacks."""
        body = self.late_body
        outs = dict(zip(self.late_outputs, body.outvars, strict=True))
        carry = [i for i in self.late_outputs if i < self.scan.num_carry]
        outvars = [outs[i] for i in self.computed_late]
        body = compat.new_jaxpr(body.invars, outvars, body.eqns, body)
        stacked = dict(zip(self.emitted, stacks, strict=True))
        return self._scan(body, [self.scan.carry_vars[i] for i in carry], stacked)

    @property
    def computed_late(self) -> list[int]:
        """Late outputs, without those that are stacks which exist already."""
        outs = dict(zip(self.late_outputs, self.late_body.outvars, strict=True))
        present = {*self.emitted, *self.scan.x_vars}
        return [
            i
            for i, atom in outs.items()
            if i < self.scan.num_carry or not (is_var(atom) and atom in present)
        ]

    def passed_through(self, stacks: Sequence[Any]) -> dict[int, Any]:
        """Returns those that do, by output."""
        present = dict(zip(self.scan.x_vars, self.scan.xs, strict=True))
        present |= dict(zip(self.emitted, stacks, strict=True))
        outs = dict(zip(self.late_outputs, self.late_body.outvars, strict=True))
        computed = self.computed_late
        return {i: present[atom] for i, atom in outs.items() if i not in computed}

    def _scan(self, body, carry_vars, stacked):
        used = live_vars(body, [True] * len(body.outvars), body.eqns)
        consts = [
            v for v in body.invars if v in used and v in set(self.scan.const_vars)
        ]
        x_operand = {
            **{v: self.operand[v] for v in self.scan.x_vars},
            **stacked,
        }
        xs = [v for v in body.invars if v in used and v in x_operand]
        order = [*consts, *carry_vars, *xs]
        body = compat.new_jaxpr(order, body.outvars, body.eqns, body)
        operands = [
            *(self.operand[v] for v in consts),
            *(self.init[v] for v in carry_vars),
            *(x_operand[v] for v in xs),
        ]
        avals = [v.aval for v in [*consts, *carry_vars]] + [
            x_operand[v].aval for v in xs
        ]
        start, stop = len(consts), len(consts) + len(carry_vars)

        def function(*values):
            def step(carry, x):
                outs = compat.evaluate(body, *values[:start], *carry, *x)
                return outs[: len(carry)], outs[len(carry) :]

            carry, ys = self.scan.run(
                step, list(values[start:stop]), list(values[stop:])
            )
            return [*carry, *ys]

        return function, operands, avals
