"""Splits loops and branches so that each belongs to one program only.

A scan over layers computes both what the early program returns and what only the late
one needs. It becomes two scans: the first emits, once per iteration, the values that
cross (a minimum cut of its body, with nested loops split in turn), and the second reads
them. A ``cond`` or a ``shard_map`` becomes two likewise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dualpipe_jax import compat
from dualpipe_jax._split.branches import CondSplit, ShardMapSplit
from dualpipe_jax._split.cut import Cut, Policy, Status, cut, result_status
from dualpipe_jax._split.flatten import Builder
from dualpipe_jax._split.fuse import fuse, read_in_step
from dualpipe_jax._split.jaxprs import is_var, live_vars, map_bodies
from dualpipe_jax._split.scans import Piece, ScanSplit

_SPLITS = {"scan": ScanSplit, "cond": CondSplit, "shard_map": ShardMapSplit}


def split(
    jaxpr: Any,
    status: Sequence[Status],
    early_outputs: Sequence[bool],
    policy: Policy,
    *,
    late_equations: Collection[int] = (),
    price: Callable[[Any], float] | None = None,
) -> Cut:
    """Cuts ``jaxpr`` as ``cut.cut`` does, after splitting its loops and branches."""
    needed = live_vars(jaxpr, early_outputs)
    live = live_vars(jaxpr, [True] * len(jaxpr.outvars))

    def choose(eqn):
        if id(eqn) in late_equations:
            return None
        return [v in needed for v in eqn.outvars], [v in live for v in eqn.outvars]

    splitter = _Splitter(jaxpr, status, policy, late_equations, choose)
    jaxpr, late_equations = splitter.run()
    return cut(
        jaxpr, status, early_outputs, policy, late_equations=late_equations, price=price
    )


def sink(jaxpr: Any) -> Any:
    """Computes cheap values of one loop inside the later loop that reads them.

    JAX's recomputing scans (remat) emit every value that their backward scan reads,
    elementwise ones included. Here only what is expensive to recompute is emitted.
    """
    eqns = [
        map_bodies(eqn, lambda b: sink(compat.open_jaxpr(b)[0])) for eqn in jaxpr.eqns
    ]
    jaxpr = fuse(compat.new_jaxpr(jaxpr.invars, jaxpr.outvars, eqns, jaxpr))
    in_step = read_in_step(jaxpr)
    live = live_vars(jaxpr, [True] * len(jaxpr.outvars))

    def choose(eqn):
        if eqn.primitive.name == "shard_map":
            return None
        early = [v in live and v not in in_step for v in eqn.outvars]
        return early, [v in live for v in eqn.outvars]

    status = [Status.FREE] * len(jaxpr.invars)
    splitter = _Splitter(jaxpr, status, Policy(late_heavy=False), (), choose, free=True)
    return fuse(splitter.run()[0])


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
        self.known = dict(zip(self.jaxpr.invars, self.status, strict=True))
        self.late: set[int] = set()
        env: dict[Any, Any] = {}

        def read(atom):
            return env.get(atom, atom) if is_var(atom) else atom

        for old in self.jaxpr.eqns:
            eqn = old.replace(invars=[read(a) for a in old.invars])
            choice = self.choose(old) if old.primitive.name in _SPLITS else None
            if choice is None or choice[0] == choice[1] or not any(choice[0]):
                self._keep(eqn, late=id(old) in self.late_equations)
            else:
                results = self._split(eqn, *choice)
                env.update((old.outvars[i], atom) for i, atom in results.items())
        outs = [read(a) for a in self.jaxpr.outvars]
        jaxpr = compat.new_jaxpr(self.jaxpr.invars, outs, self.eqns, self.jaxpr)
        return jaxpr, frozenset(self.late)

    def _split(self, eqn: Any, early: list[bool], live: list[bool]) -> dict[int, Any]:
        def split_body(body, status, early_outputs, price):
            return split(body, status, early_outputs, self.policy, price=price)

        status = [self._body_status(a) for a in eqn.invars]
        halves = _SPLITS[eqn.primitive.name](eqn, early, live, status, split_body)
        outs = self._append(halves.early(), eqn, late=False)
        num = len(halves.early_outputs)
        results = dict(zip(halves.early_outputs, outs[:num], strict=True))
        if halves.late_outputs:
            piece, present = halves.late(outs[num:])
            results |= present
            if piece is not None:
                late = self._append(piece, eqn, late=not self.free)
                results |= dict(zip(halves.computed_late, late, strict=True))
        return results

    def _append(self, piece: Piece, origin: Any, late: bool) -> list[Any]:
        builder = Builder(within=origin)
        outs = piece(builder)
        for eqn in builder.eqns:
            self._keep(eqn, late)
        return outs

    def _keep(self, eqn: Any, late: bool) -> None:
        self.eqns.append(eqn)
        if late:
            self.late.add(id(eqn))
        operands = [self._status_of(a) for a in eqn.invars]
        result = Status.LATE if late else result_status(eqn, operands)
        self.known |= dict.fromkeys(eqn.outvars, result)

    def _status_of(self, atom: Any) -> Status:
        return self.known[atom] if is_var(atom) else Status.CONSTANT

    def _body_status(self, atom: Any) -> Status:
        status = self._status_of(atom)
        return Status.FREE if self.free and status is Status.EARLY else status
