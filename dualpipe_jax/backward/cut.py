"""Cuts a jaxpr into an early and a late program that together compute the same.

This one operation splits a training step: forward and backward are the two halves of
the joint jaxpr, and backward-for-input and backward-for-weights are the two halves of
the backward. A minimum cut over bytes chooses what the late half reads from the early
one; cheap equations may be repeated, heavy ones may not.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dualpipe_jax import compat
from dualpipe_jax.backward.jaxprs import (
    Kind,
    is_barrier,
    is_var,
    kind,
    live_vars,
    nbytes,
    real_effects,
    slice_jaxpr,
)
from dualpipe_jax.backward.mincut import cheapest_cut


class Status(enum.IntEnum):
    """Where a value is available, from everywhere to one program only.

    A result's status is at least the highest among its operands.
    """

    CONSTANT = 0  # in both programs, the same in every call
    STATIC = 1  # in both programs: parameters
    FREE = 2  # in both programs: residuals, when the backward is cut
    EARLY = 3  # in the early program, which must pass it to the late one
    LATE = 4  # only in the late program


def result_status(eqn: Any, operands: Sequence[Status]) -> Status:
    """Returns the status of an equation's results, if it may run anywhere.

    Constants are computed wherever they are read, whatever the cost: keeping them would
    keep one copy per call. Values that depend on parameters only (a cast of the
    weights) are recomputed too, unless that takes a matrix product. Collectives never
    run twice.
    """
    highest = max(operands, default=Status.CONSTANT)
    if highest is Status.CONSTANT:
        repeatable = kind(eqn) < Kind.HEAVY or not eqn.effects
    elif highest is Status.STATIC:
        repeatable = kind(eqn) < Kind.HEAVY
    elif highest is Status.FREE:
        repeatable = kind(eqn) is Kind.CHEAP
    else:
        repeatable = True
    return highest if repeatable else Status.EARLY


@dataclasses.dataclass(frozen=True)
class Policy:
    """What may move between the two programs.

    Attributes:
      late_heavy: whether equations that only late outputs need and that are not cheap
        run late (the weight gradients) or early (what the forward pass saves).
      early_reductions: whether a reduction that only late outputs need may run early
        where fewer bytes then cross.
    """

    late_heavy: bool
    early_reductions: bool = True

    def only_late(self, kind: Kind) -> bool:
        """Whether an equation of a kind runs late if only late outputs need it."""
        limit = Kind.REDUCE if self.early_reductions else Kind.CHEAP
        return self.late_heavy and kind > limit


@dataclasses.dataclass(frozen=True)
class Cut:
    """Two programs and what passes between them.

    Attributes:
      early: (inputs that are not late) -> (early outputs, crossing).
      late: (inputs of both programs, crossing, late inputs) -> late outputs.
      crossing: the variables of the original jaxpr that cross.
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
      status: for each input, where it is available.
      early_outputs: for each output, whether the early program returns it.
      policy: what may move.
      late_equations: ids of equations that must run late.
      price: the cost of keeping a variable; by default its size in bytes.
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
        self.effectful = [eqn for eqn in jaxpr.eqns if real_effects(eqn)]
        pinned = self._early_effects(late_equations)
        self.pinned = {id(eqn) for eqn in pinned}
        self.needed_early = live_vars(jaxpr, early_outputs, pinned, whole=True)
        self.status = self._propagate(late_equations)

    def _early_effects(self, late: Collection[int]) -> list[Any]:
        """A print runs early unless it reads what only the late program has."""
        effectful = [eqn for eqn in self.effectful if id(eqn) not in late]
        if not effectful or not self.policy.late_heavy:
            return effectful
        wanted = live_vars(self.jaxpr, self.early_outputs, whole=True)
        chosen = []
        for eqn in effectful:
            live = live_vars(self.jaxpr, [False] * len(self.jaxpr.outvars), [eqn])
            extra = {id(self.producer[v]) for v in live - wanted if v in self.producer}
            if all(self.kinds[e] < Kind.FIXED for e in extra):
                chosen.append(eqn)
            elif any(map(compat.is_ordered, eqn.effects)):
                raise ValueError(
                    f"fn must not have an ordered effect ({eqn.primitive.name}) in its "
                    "backward pass that only weight gradients need: I and W run at "
                    "different times; make it unordered."
                )
        return chosen

    def _only_late(self, eqn: Any) -> bool:
        return not any(v in self.needed_early for v in eqn.outvars)

    def _must_be_late(self, eqn: Any) -> bool:
        """Whether only the late program may run ``eqn``, whatever its operands."""
        late = self.policy.only_late(self.kinds[id(eqn)])
        return late and self._only_late(eqn) and id(eqn) not in self.pinned

    def _propagate(self, late: Collection[int]) -> dict[Any, Status]:
        status = dict(self.input_status)
        for eqn in self.jaxpr.eqns:
            operands = [status[a] if is_var(a) else Status.CONSTANT for a in eqn.invars]
            if id(eqn) in late:
                results = [Status.LATE] * len(eqn.outvars)
            elif is_barrier(eqn):
                results = [Status.EARLY if s is Status.FREE else s for s in operands]
            else:
                result = result_status(eqn, operands)
                # Free values are recomputed under the rules for early ones.
                if result is Status.FREE:
                    result = Status.EARLY
                if result is Status.EARLY and self._must_be_late(eqn):
                    result = Status.LATE
                results = [result] * len(eqn.outvars)
            status.update(zip(eqn.outvars, results, strict=True))
        return status

    def cut(self) -> Cut:
        needed = self._needed_late()
        prices, operands, only_early = {}, {}, []
        for var in needed.wanted:
            late_only = var not in self.needed_early
            prices[var] = 2 * self.price(var) + (1 if late_only else 0)
            if (sources := self._recompute_from(var)) is None:
                only_early.append(var)
            else:
                operands[var] = [s for s in sources if is_var(s) and s in needed.wanted]
        keep, _ = cheapest_cut(prices, operands, only_early, needed.roots)
        order = [*self.jaxpr.invars, *(v for e in self.jaxpr.eqns for v in e.outvars)]
        crossing = tuple(v for v in order if v in keep)
        return Cut(self._early(crossing), self._late(crossing), crossing)

    def _recompute_from(self, var: Any) -> Sequence[Any] | None:
        """Returns what ``var`` can be recomputed from; None if it must not be."""
        eqn = self.producer.get(var)
        if eqn is None:
            return None
        if self.kinds[id(eqn)] is Kind.CHEAP:
            return _read_for(eqn, var)
        if self.kinds[id(eqn)] is Kind.REDUCE and self._only_late(eqn):
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
        for eqn in self.effectful:
            if id(eqn) not in self.pinned:
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
                for a in _read_for(eqn, var):
                    visit(a, root=status is Status.LATE)
        return _Needed(wanted, roots)

    def _early(self, crossing: Sequence[Any]) -> Any:
        invars = [v for v in self.jaxpr.invars if self.input_status[v] < Status.LATE]
        outvars = [*self._outputs(early=True), *crossing]
        return slice_jaxpr(self.jaxpr, invars, outvars, self.pinned)

    def _late(self, crossing: Sequence[Any]) -> Any:
        status = self.input_status
        common = [v for v in self.jaxpr.invars if status[v] <= Status.FREE]
        own = [v for v in self.jaxpr.invars if status[v] is Status.LATE]
        effects = {id(eqn) for eqn in self.effectful} - self.pinned
        invars = [*common, *crossing, *own]
        return slice_jaxpr(self.jaxpr, invars, self._outputs(early=False), effects)

    def _outputs(self, early: bool) -> list[Any]:
        pairs = zip(self.jaxpr.outvars, self.early_outputs, strict=True)
        return [v for v, is_early in pairs if is_early is early]


@dataclasses.dataclass(frozen=True)
class _Needed:
    wanted: dict[Any, None]  # early values that could be passed to the late program
    roots: dict[Any, None]  # those that it certainly reads


def _read_for(eqn: Any, result: Any) -> Sequence[Any]:
    """Returns the operands that one result depends on."""
    if is_barrier(eqn):
        return [eqn.invars[eqn.outvars.index(result)]]
    return eqn.invars
