"""Jaxprs without calls: inlining, with equal cheap equations merged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core

from dualpipe_jax import compat
from dualpipe_jax.backward.jaxprs import (
    Atom,
    Kind,
    Literal,
    barrier_equation,
    is_barrier,
    is_var,
    kind,
    map_bodies,
    trace,
)


def flatten(
    closed: Any, *, inline_custom: bool, platform: str | None = None
) -> tuple[Any, tuple[Any, ...]]:
    """Inlines calls, and merges equal cheap equations, at every depth.

    ``jit`` and remat disappear; a remat of a backward pass leaves an
    ``optimization_barrier`` on its operands, as its lowering would, so that XLA does
    not merge the recomputation with the forward pass that it repeats.

    Args:
      closed: a closed jaxpr.
      inline_custom: whether to inline calls with custom derivatives too, as is right
        in a backward pass, which is not differentiated again.
      platform: where it will run, such as `"cuda"`, if known: of the branches of a
        `lax.platform_dependent`, only that platform's is inlined.

    Returns:
      A jaxpr without constants whose first inputs are the constants, and their values.
    """
    jaxpr, consts = compat.open_jaxpr(closed)
    builder = Builder(inline_custom=inline_custom, platform=platform)
    invars = [*jaxpr.constvars, *jaxpr.invars]
    outs = builder.inline(jaxpr, invars, rename=False)
    return compat.new_jaxpr(invars, outs, builder.eqns, jaxpr), consts


@dataclasses.dataclass
class Builder:
    """A list of equations under construction.

    Attributes:
      inline_custom: whether calls with custom derivatives are inlined too.
      platform: see `flatten`.
      within: an equation whose name scope (for profiles) encloses the new ones.
      eqns: the list.
      seen: cheap equations in the list, by what they compute.
    """

    inline_custom: bool = False
    platform: str | None = None
    within: Any = None
    eqns: list[Any] = dataclasses.field(default_factory=list)
    seen: dict[Any, list[Any]] = dataclasses.field(default_factory=dict)

    def inline(
        self,
        jaxpr: Any,
        args: Sequence[Atom],
        *,
        rename: bool = True,
        within: Any = None,
    ) -> list[Atom]:
        """Appends the flattened equations of ``jaxpr``; returns its outputs."""
        within = within or self.within
        inner = [*jaxpr.constvars, *jaxpr.invars]
        env: dict[Any, Atom] = dict(zip(inner, args, strict=True))

        def read(atom: Atom) -> Atom:
            return env[atom] if is_var(atom) else atom

        for eqn in jaxpr.eqns:
            if within is not None:
                eqn = compat.within_scope(eqn, within)
            operands = [read(a) for a in eqn.invars]
            body = compat.call_body(eqn) or compat.expansion(eqn)
            if body is None and self.inline_custom:
                body = compat.custom_body(eqn)
            chosen = compat.branch_for(eqn, self.platform)
            if chosen is not None:
                results = self.inline_closed(chosen, operands[1:], within=eqn)
            elif body is not None:
                results = self._call(eqn, body, operands)
            else:
                results = self._emit(eqn, operands, rename)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def inline_closed(
        self, closed: Any, args: Sequence[Atom], *, within: Any = None
    ) -> list[Atom]:
        """The same for a closed jaxpr; its constants become literals."""
        jaxpr, consts = compat.open_jaxpr(closed)
        literals = [Literal(c, jax.typeof(c)) for c in consts]
        return self.inline(jaxpr, [*literals, *args], within=within)

    def _call(self, eqn: Any, body: Any, operands: list[Atom]) -> list[Atom]:
        guarded = eqn.params.get("prevent_cse", False)
        if eqn.params.get("differentiated") and guarded:
            if guarded is True:
                guarded = (True,) * len(operands)
            operands = self._barrier(operands, guarded)
        before, after = compat.call_shardings(eqn)
        operands = self._constrain(operands, before)
        results = self.inline_closed(body, operands, within=eqn)
        return self._constrain(results, after)

    def _constrain(self, atoms: list[Atom], shardings: Sequence[Any]) -> list[Atom]:
        """Keeps the shardings that an inlined ``jit`` specified."""
        atoms = list(atoms)
        for i, sharding in enumerate(shardings):
            if sharding is not None:
                apply = functools.partial(
                    jax.lax.with_sharding_constraint, shardings=sharding
                )
                (atoms[i],) = self.inline_closed(
                    trace(apply, [atoms[i].aval]), [atoms[i]]
                )
        return atoms

    def _barrier(self, operands: list[Atom], guarded: Sequence[bool]) -> list[Atom]:
        chosen = [a for a, g in zip(operands, guarded, strict=True) if g and is_var(a)]
        chosen = list(dict.fromkeys(chosen))
        if not chosen:
            return operands
        outs = [jex_core.Var(v.aval) for v in chosen]
        self.eqns.append(barrier_equation(chosen, outs))
        env = dict(zip(chosen, outs, strict=True))
        return [
            env[a] if g and is_var(a) else a
            for a, g in zip(operands, guarded, strict=True)
        ]

    def _emit(self, eqn: Any, operands: list[Atom], rename: bool) -> list[Atom]:
        if any(compat.is_ref(a.aval) for a in (*operands, *eqn.outvars)):
            raise ValueError(
                f"fn must not read or write a jax.Ref (in {eqn.primitive.name}): the "
                "caller chooses when each half of the backward pass runs; return the "
                "new value instead."
            )
        eqn = self._flatten_bodies(eqn)
        key = None
        if kind(eqn) <= Kind.REDUCE and not is_barrier(eqn):
            key = _equation_key(eqn, operands)
            if key is not None and key in self.seen:
                return self.seen[key]
        outs = [jex_core.Var(v.aval) for v in eqn.outvars] if rename else eqn.outvars
        self.eqns.append(eqn.replace(invars=operands, outvars=outs))
        if key is not None:
            self.seen[key] = outs
        return outs

    def _flatten_bodies(self, eqn: Any) -> Any:
        def flat(body):
            jaxpr, _ = compat.open_jaxpr(body)
            builder = Builder(self.inline_custom, self.platform)
            outs = builder.inline_closed(body, jaxpr.invars)
            return compat.new_jaxpr(jaxpr.invars, outs, builder.eqns, jaxpr)

        return map_bodies(eqn, flat)


def join(
    forward: Any, backward: Any, num_consts: int, num_own_consts: int, num_kept: int
) -> tuple[Any, frozenset[int]]:
    """Joins a forward pass and the pullback that reads its saved values in one jaxpr.

    Args:
      forward: constants, arguments -> ``num_kept`` outputs, saved values.
      backward: its constants, saved values, cotangents -> cotangents.
      num_consts: number of constants of ``forward``.
      num_own_consts: number of constants of ``backward``.
      num_kept: number of outputs of ``forward`` that are not saved values.

    Returns:
      The jaxpr (both constants, arguments, cotangents -> outputs, cotangents), and the
      ids of its backward equations.
    """
    saved = forward.outvars[num_kept:]
    own, rest = backward.invars[:num_own_consts], backward.invars[num_own_consts:]
    env = dict(zip(rest, saved, strict=False))
    cotangents = rest[len(saved) :]

    def read(atom: Atom) -> Atom:
        return env.get(atom, atom) if is_var(atom) else atom

    eqns = [eqn.replace(invars=[read(a) for a in eqn.invars]) for eqn in backward.eqns]
    consts, args = forward.invars[:num_consts], forward.invars[num_consts:]
    joint = compat.new_jaxpr(
        [*consts, *own, *args, *cotangents],
        [*forward.outvars[:num_kept], *map(read, backward.outvars)],
        [*forward.eqns, *eqns],
        forward,
    )
    return joint, frozenset(map(id, eqns))


def _equation_key(eqn: Any, operands: Sequence[Atom]) -> Any | None:
    """Returns a key that equal equations share; None if there is no safe one."""
    atoms = []
    for atom in operands:
        if is_var(atom):
            atoms.append(atom)
        elif np.ndim(atom.val) == 0 and isinstance(atom.val, (int, float, np.generic)):
            atoms.append((np.asarray(atom.val).tobytes(), str(atom.aval)))
        else:
            return None
    params = tuple(sorted(eqn.params.items(), key=lambda item: item[0]))
    key = (eqn.primitive, tuple(atoms), params, id(eqn.ctx))
    try:
        hash(key)
    except TypeError:
        return None
    return key
