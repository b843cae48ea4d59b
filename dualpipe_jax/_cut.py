"""Cuts a jaxpr into an early and a late program that together compute the same.

The one operation behind the split of a training step: forward and backward are the two
halves of the joint jaxpr, and backward-for-input and backward-for-weights are the two
halves of the backward. What the late half reads from the early one is chosen by a
minimum cut over bytes, in which cheap equations may be repeated and heavy ones may not.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jax.extend import core as jex_core

from dualpipe_jax import compat
from dualpipe_jax._jaxprs import (
    Kind,
    barrier_equation,
    is_var,
    kind,
    live_vars,
    nbytes,
    real_effects,
)
from dualpipe_jax._mincut import cheapest_cut


class Status(enum.Enum):
    """Where a value can be had."""

    STATIC = "static"  # in both programs: parameters and constants
    FREE = "free"  # in both programs: residuals, when the backward is cut
    EARLY = "early"  # in the early program; the late one must be handed it
    LATE = "late"  # only in the late program


@dataclasses.dataclass(frozen=True)
class Policy:
    """What may move between the two programs.

    Attributes:
      late_heavy: equations that only late outputs need and that are not cheap run late
        (the weight gradients); otherwise early (what the forward pass saves).
      early_reductions: a reduction that only late outputs need may run early where
        less then crosses.
    """

    late_heavy: bool
    early_reductions: bool = True


@dataclasses.dataclass(frozen=True)
class Cut:
    """Two programs and what passes between them.

    Attributes:
      early: (inputs that are not late) -> (early outputs, crossing).
      late: (static and free inputs, crossing, late inputs) -> late outputs.
      crossing: the variables, of the jaxpr that was cut, that cross.
    """

    early: Any
    late: Any
    crossing: tuple[Any, ...]


def cut(
    jaxpr: Any,
    status: Sequence[Status],
    early_outputs: Sequence[bool],
    policy: Policy,
    *,
    late_equations: Collection[int] = (),
    price: Callable[[Any], float] | None = None,
) -> Cut:
    """Cuts ``jaxpr``.

    Args:
      jaxpr: flat, without constants.
      status: for each input, where it can be had.
      early_outputs: for each output, whether the early program returns it.
      policy: what may move.
      late_equations: ids of equations that must run late.
      price: what keeping a variable costs; by default its bytes.
    """
    return _Cutter(jaxpr, status, early_outputs, policy, late_equations, price).cut()


class _Cutter:
    def __init__(self, jaxpr, status, early_outputs, policy, late_equations, price):
        self.jaxpr = jaxpr
        self.policy = policy
        self.early_outputs = early_outputs
        self.price = price or (lambda var: nbytes(var.aval))
        self.input_status = dict(zip(jaxpr.invars, status, strict=True))
        self.producer = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.kinds = {id(eqn): kind(eqn) for eqn in jaxpr.eqns}
        pinned = [
            eqn
            for eqn in jaxpr.eqns
            if real_effects(eqn) and id(eqn) not in late_equations
        ]
        self.pinned = self._early_effects(pinned)
        self.needed_early = live_vars(jaxpr, early_outputs, self.pinned)
        self.status = self._propagate(set(late_equations))

    def _early_effects(self, effectful: Sequence[Any]) -> list[Any]:
        """A print runs early unless it reports on what only the late program has."""
        if not effectful or not self.policy.late_heavy:
            return list(effectful)
        wanted = live_vars(self.jaxpr, self.early_outputs)
        chosen = []
        for eqn in effectful:
            live = live_vars(self.jaxpr, [False] * len(self.jaxpr.outvars), [eqn])
            extra = {id(self.producer[v]) for v in live - wanted if v in self.producer}
            if all(self.kinds[e] < Kind.FIXED for e in extra):
                chosen.append(eqn)
        return chosen

    def _must_be_late(self, eqn: Any) -> bool:
        """Whether only the late program may run ``eqn``, whatever its operands."""
        if not self.policy.late_heavy or id(eqn) in {id(e) for e in self.pinned}:
            return False
        if any(v in self.needed_early for v in eqn.outvars):
            return False
        limit = Kind.REDUCE if self.policy.early_reductions else Kind.CHEAP
        return self.kinds[id(eqn)] > limit

    def _propagate(self, late: set[int]) -> dict[Any, Status]:
        status = dict(self.input_status)

        def of(atom):
            return status[atom] if is_var(atom) else Status.STATIC

        for eqn in self.jaxpr.eqns:
            operands = [of(a) for a in eqn.invars]
            if eqn.primitive.name == "optimization_barrier" and id(eqn) not in late:
                for var, s in zip(eqn.outvars, operands, strict=True):
                    status[var] = Status.EARLY if s is Status.FREE else s
                continue
            if id(eqn) in late or Status.LATE in operands or self._must_be_late(eqn):
                result = Status.LATE
            elif (
                all(s is Status.STATIC for s in operands)
                and self.kinds[id(eqn)] < Kind.HEAVY
            ):
                result = Status.STATIC
            else:
                result = Status.EARLY
            for var in eqn.outvars:
                status[var] = result
        return status

    def cut(self) -> Cut:
        needed = self._needed_late()
        prices, operands, only_early, sinks = {}, {}, [], []
        for var in needed.wanted:
            late_only = var not in self.needed_early
            prices[var] = 2 * self.price(var) + (1 if late_only else 0)
            if (sources := self._recompute_from(var)) is None:
                only_early.append(var)
            else:
                operands[var] = [s for s in sources if is_var(s) and s in needed.wanted]
        sinks = list(needed.roots)
        keep, _ = cheapest_cut(prices, operands, only_early, sinks)
        order = {v: i for i, v in enumerate(self.jaxpr.invars)}
        for eqn in self.jaxpr.eqns:
            for v in eqn.outvars:
                order[v] = len(order)
        crossing = tuple(sorted(keep, key=order.__getitem__))
        return Cut(self._early(crossing), self._late(crossing), crossing)

    def _recompute_from(self, var: Any) -> Sequence[Any] | None:
        """Returns what ``var`` can be recomputed from; None if it may not be."""
        eqn = self.producer.get(var)
        if eqn is None:
            return None
        if eqn.primitive.name == "optimization_barrier":
            return [eqn.invars[eqn.outvars.index(var)]]
        kind_ = self.kinds[id(eqn)]
        only_late = not any(v in self.needed_early for v in eqn.outvars)
        if kind_ is Kind.CHEAP or (only_late and kind_ is Kind.REDUCE):
            return eqn.invars
        return None

    def _needed_late(self) -> _Needed:
        """Finds the early values that the late program might read."""
        wanted: dict[Any, None] = {}
        roots: dict[Any, None] = {}
        visited: set[Any] = set()
        stack: list[Any] = []

        def visit(atom, root):
            if not is_var(atom):
                return
            status = self.status[atom]
            if status is Status.EARLY and root:
                roots[atom] = None
            if atom not in visited:
                visited.add(atom)
                stack.append(atom)

        for var, early in zip(self.jaxpr.outvars, self.early_outputs, strict=True):
            if not early:
                visit(var, root=True)
        for eqn in self.jaxpr.eqns:
            if real_effects(eqn) and id(eqn) not in {id(e) for e in self.pinned}:
                for a in eqn.invars:
                    visit(a, root=True)
        while stack:
            var = stack.pop()
            status = self.status[var]
            eqn = self.producer.get(var)
            if status is Status.EARLY:
                wanted[var] = None
                for a in self._recompute_from(var) or ():
                    visit(a, root=False)
            elif eqn is not None:
                if eqn.primitive.name == "optimization_barrier":
                    atoms = [eqn.invars[eqn.outvars.index(var)]]
                else:
                    atoms = eqn.invars
                for a in atoms:
                    visit(a, root=status is Status.LATE)
        return _Needed(wanted, roots)

    def _early(self, crossing: Sequence[Any]) -> Any:
        invars = [
            v for v in self.jaxpr.invars if self.input_status[v] is not Status.LATE
        ]
        outs = [
            v
            for v, early in zip(self.jaxpr.outvars, self.early_outputs, strict=True)
            if early
        ]
        outvars = [*outs, *crossing]
        pinned = {id(e) for e in self.pinned}
        live = {v for v in outvars if is_var(v)}
        eqns = []
        for eqn in reversed(self.jaxpr.eqns):
            if id(eqn) not in pinned and not any(v in live for v in eqn.outvars):
                continue
            eqn = _narrow_barrier(eqn, live)
            eqns.append(eqn)
            live.update(a for a in eqn.invars if is_var(a))
        return compat.new_jaxpr(invars, outvars, eqns[::-1], self.jaxpr)

    def _late(self, crossing: Sequence[Any]) -> Any:
        common = [
            v
            for v in self.jaxpr.invars
            if self.input_status[v] in (Status.STATIC, Status.FREE)
        ]
        own = [v for v in self.jaxpr.invars if self.input_status[v] is Status.LATE]
        given = {*common, *own, *crossing}
        outs = [
            v
            for v, early in zip(self.jaxpr.outvars, self.early_outputs, strict=True)
            if not early
        ]
        pinned = {id(e) for e in self.pinned}
        live = {v for v in outs if is_var(v)}
        eqns = []
        for eqn in reversed(self.jaxpr.eqns):
            effectful = real_effects(eqn) and id(eqn) not in pinned
            mask = [v in live and v not in given for v in eqn.outvars]
            if not effectful and not any(mask):
                continue
            eqn = _narrow_barrier(eqn, {v for v in live if v not in given})
            eqns.append(eqn)
            live.update(a for a in eqn.invars if is_var(a))
        return compat.new_jaxpr(
            [*common, *crossing, *own], outs, _unshadow(eqns[::-1], given), self.jaxpr
        )


@dataclasses.dataclass(frozen=True)
class _Needed:
    wanted: dict[Any, None]  # early values that the late program could be handed
    roots: dict[Any, None]  # those that it reads for certain


def _narrow_barrier(eqn: Any, live: Collection[Any]) -> Any:
    """Drops the operands of a barrier that this program does not read."""
    if eqn.primitive.name != "optimization_barrier":
        return eqn
    pairs = [(a, v) for a, v in zip(eqn.invars, eqn.outvars, strict=True) if v in live]
    return barrier_equation([a for a, _ in pairs], [v for _, v in pairs])


def _unshadow(eqns: Sequence[Any], given: Collection[Any]) -> list[Any]:
    """Renames results that the program also receives as inputs."""
    fixed = []
    for eqn in eqns:
        if any(v in given for v in eqn.outvars):
            outvars = [jex_core.Var(v.aval) if v in given else v for v in eqn.outvars]
            eqn = eqn.replace(outvars=outvars)
        fixed.append(eqn)
    return fixed
