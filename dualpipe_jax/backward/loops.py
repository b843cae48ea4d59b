"""Splits loops and branches so that each belongs to one program only.

A scan over layers computes both what the early program returns and what only the late
one needs. It is split into two scans: the first emits, in each iteration, the values
that cross (a minimum cut of its body, with nested loops split recursively), and the
second reads them. A ``cond`` or a ``shard_map`` is split likewise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dualpipe_jax import compat
from dualpipe_jax.backward.branches import CondSplit, ShardMapSplit
from dualpipe_jax.backward.cut import Cut, Policy, Status, cut, result_status
from dualpipe_jax.backward.flatten import Builder
from dualpipe_jax.backward.fuse import fuse, read_in_step
from dualpipe_jax.backward.jaxprs import (
    dce,
    is_barrier,
    is_var,
    kind,
    live_vars,
    map_bodies,
    narrow_barrier,
    needed_operands,
    real_effects,
)
from dualpipe_jax.backward.scans import Piece, ScanSplit

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

    def choose(eqn):
        late = id(eqn) in late_equations
        return [not late and v in needed for v in eqn.outvars]

    splitter = _Splitter(jaxpr, status, policy, late_equations, choose)
    jaxpr, late_equations = splitter.run()
    return cut(
        jaxpr, status, early_outputs, policy, late_equations=late_equations, price=price
    )


def sink(jaxpr: Any) -> Any:
    """Computes cheap values of one loop inside the later loop that reads them.

    JAX's recomputing scans (remat) emit every value that their backward scan reads,
    elementwise ones included. This emits only what is expensive to recompute.
    """
    eqns = [
        map_bodies(eqn, lambda b: sink(compat.open_jaxpr(b)[0])) for eqn in jaxpr.eqns
    ]
    jaxpr = dce(fuse(compat.new_jaxpr(jaxpr.invars, jaxpr.outvars, eqns, jaxpr)))
    in_step = read_in_step(jaxpr)

    def choose(eqn):
        return [v not in in_step for v in eqn.outvars]

    status = [Status.FREE] * len(jaxpr.invars)
    splitter = _Splitter(jaxpr, status, Policy(late_heavy=False), (), choose, free=True)
    return fuse(splitter.run()[0])


def _keep_body(
    body: Any, _: Sequence[Status], early_outputs: Sequence[bool], price: Any
) -> Cut:
    """Gives a body to the one half that needs its outputs; drops unused equations."""
    del price
    status = [Status.FREE] * len(body.invars)

    def choose(eqn):
        return [True] * len(eqn.outvars)

    splitter = _Splitter(body, status, Policy(late_heavy=False), (), choose)
    body = splitter.run()[0]
    nothing = compat.new_jaxpr([], [], [], body)
    pair = (body, nothing) if all(early_outputs) else (nothing, body)
    return Cut(*pair, crossing=())


@dataclasses.dataclass
class _Splitter:
    """Rewrites the loops and branches of one jaxpr.

    Attributes:
      choose: returns which results of an equation are needed early.
      free: whether the operands of a loop are available to both of its halves.
    """

    jaxpr: Any
    status: Sequence[Status]
    policy: Policy
    late_equations: Collection[int]
    choose: Callable[[Any], list[bool]]
    free: bool = False

    def run(self) -> tuple[Any, frozenset[int]]:
        """Returns the new jaxpr and the ids of its equations that must run late."""
        self.eqns: list[Any] = []
        self.known = dict(zip(self.jaxpr.invars, self.status, strict=True))
        self.late: set[int] = set()
        used = live_vars(self.jaxpr, [True] * len(self.jaxpr.outvars), effects=True)
        env: dict[Any, Any] = {}

        def read(atom):
            return env.get(atom, atom) if is_var(atom) else atom

        for old in self.jaxpr.eqns:
            live = [v in used for v in old.outvars]
            if not any(live) and not real_effects(old):
                continue
            if old.primitive.name in _SPLITS and any(live):
                results = self._rewrite(old, read, live)
                env.update((old.outvars[i], atom) for i, atom in results.items())
            else:
                new = narrow_barrier(old, live) if is_barrier(old) else old
                new = new.replace(invars=[read(a) for a in new.invars])
                self._keep(new, self._is_late(old))
        outs = [read(a) for a in self.jaxpr.outvars]
        jaxpr = compat.new_jaxpr(self.jaxpr.invars, outs, self.eqns, self.jaxpr)
        return jaxpr, frozenset(self.late)

    def _rewrite(self, old: Any, read: Callable, live: list[bool]) -> dict[int, Any]:
        """Splits a loop, or drops its unused results and operands."""
        early = [e and n for e, n in zip(self.choose(old), live, strict=True)]
        needed = needed_operands(old, live, effects=True)
        whole = early == live or not any(early)
        # An unneeded operand may no longer exist: use any until it is dropped.
        eqn = old.replace(
            invars=[
                read(a) if n else a for a, n in zip(old.invars, needed, strict=True)
            ]
        )
        late = self._is_late(old)
        if whole and all(live) and all(needed):
            self._keep(eqn, late)
            return dict(enumerate(old.outvars))
        status = [
            self._body_status(a) if n else Status.FREE
            for a, n in zip(eqn.invars, needed, strict=True)
        ]
        split_body = _keep_body if whole else self._split_body
        halves = _SPLITS[old.primitive.name](eqn, early, live, status, split_body)
        results, crossing = {}, []
        if halves.early_outputs:
            outs = self._append(halves.early(), eqn, late)
            num = len(halves.early_outputs)
            results = dict(zip(halves.early_outputs, outs[:num], strict=True))
            crossing = outs[num:]
        if halves.late_outputs:
            piece, present = halves.late(crossing)
            results |= present
            if piece is not None:
                outs = self._append(piece, eqn, late or not (whole or self.free))
                results |= dict(zip(halves.computed_late, outs, strict=True))
        return results

    def _is_late(self, eqn: Any) -> bool:
        if id(eqn) in self.late_equations:
            return True
        late = self.policy.only_late(kind(eqn)) and not real_effects(eqn)
        return late and not any(self.choose(eqn))

    def _split_body(self, body, status, early_outputs, price):
        return split(body, status, early_outputs, self.policy, price=price)

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
