"""Runs cheap loops and branches inside the loops and branches that read them.

If the values that a scan saves are recomputed rather than kept, the recomputation is
itself a scan, and its stacked results are as large as what was not kept. It belongs
inside the scan that reads them, one iteration at a time. The same holds for conds on
one index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dualpipe_jax import compat
from dualpipe_jax.backward.branches import append_cond
from dualpipe_jax.backward.flatten import Builder
from dualpipe_jax.backward.jaxprs import (
    Kind,
    avals_of,
    bodies,
    is_var,
    kind,
    map_bodies,
    real_effects,
    trace,
)
from dualpipe_jax.backward.scans import Scan


def read_in_step(jaxpr: Any) -> set[Any]:
    """Returns the results read only by similar equations, in step with their producer.

    For a scan: stacked results read only as per-iteration inputs of scans of the same
    length. For a cond: results read only by conds on the same index.
    """
    rhythm: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if (beat := _rhythm(eqn)) is not None:
            first = compat.scan_sizes(eqn)[1] if eqn.primitive.name == "scan" else 0
            rhythm |= dict.fromkeys(eqn.outvars[first:], beat)
    barred = {v for v in jaxpr.outvars if is_var(v)}
    for eqn in jaxpr.eqns:
        beat = _rhythm(eqn)
        start = len(eqn.invars) if beat is None else _first_in_step(eqn)
        barred |= {a for a in eqn.invars[:start] if is_var(a)}
        barred |= {a for a in eqn.invars[start:] if is_var(a) and rhythm.get(a) != beat}
    return set(rhythm) - barred


def _rhythm(eqn: Any) -> Any | None:
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "cond" and is_var(eqn.invars[0]):
        return eqn.invars[0]
    return None


def _first_in_step(eqn: Any) -> int:
    """Returns the position of the first operand that is read per iteration."""
    return sum(compat.scan_sizes(eqn)) if eqn.primitive.name == "scan" else 1


def fuse(jaxpr: Any) -> Any:
    """Moves cheap scans that carry nothing, and cheap conds, into their readers."""
    eqns = [
        map_bodies(eqn, lambda b: fuse(compat.open_jaxpr(b)[0])) for eqn in jaxpr.eqns
    ]
    jaxpr = compat.new_jaxpr(jaxpr.invars, jaxpr.outvars, eqns, jaxpr)
    in_step = read_in_step(jaxpr)
    producers: dict[Any, Any] = {}
    builder = Builder()
    env: dict[Any, Any] = {}

    def read(atom):
        return env.get(atom, atom) if is_var(atom) else atom

    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=[read(a) for a in eqn.invars])
        if any(is_var(a) and a in producers for a in eqn.invars):
            fuse_into = (
                _fuse_into_scan if eqn.primitive.name == "scan" else _fuse_into_cond
            )
            results = fuse_into(builder, eqn, producers)
            env.update(zip(eqn.outvars, results, strict=True))
        elif _is_cheap(eqn) and all(v in in_step for v in eqn.outvars):
            producers |= dict.fromkeys(eqn.outvars, eqn)
        else:
            builder.eqns.append(eqn)
    outs = [read(a) for a in jaxpr.outvars]
    return compat.new_jaxpr(jaxpr.invars, outs, builder.eqns, jaxpr)


def _is_cheap(eqn: Any) -> bool:
    if _rhythm(eqn) is None or real_effects(eqn) or kind(eqn) >= Kind.HEAVY:
        return False
    return eqn.primitive.name == "cond" or compat.scan_sizes(eqn)[1] == 0


def _sources(atoms: Sequence[Any], producers: dict[Any, Any]) -> list[Any]:
    found = [producers[a] for a in atoms if is_var(a) and a in producers]
    return list({id(eqn): eqn for eqn in found}.values())


def _fuse_into_scan(builder: Builder, eqn: Any, producers: dict[Any, Any]) -> list:
    scan = Scan(eqn)
    sources = [Scan(e) for e in _sources(scan.xs, producers)]
    own_xs = [a for a in scan.xs if not (is_var(a) and a in producers)]
    groups = [
        *(s.consts for s in sources),
        *(s.xs for s in sources),
        scan.consts,
        scan.init,
        own_xs,
    ]
    operands = [a for group in groups for a in group]

    def fused(*values):
        taken = _take(groups, values)
        source_consts, taken = taken[: len(sources)], taken[len(sources) :]
        source_xs, (consts, init, own) = taken[: len(sources)], taken[len(sources) :]

        def step(carry, x):
            source_x, own_x = x
            made = _run_all([s.eqn for s in sources], source_consts, source_x)
            rest = iter(own_x)
            mine = [made[a] if is_var(a) and a in made else next(rest) for a in scan.xs]
            outs = compat.evaluate(scan.body, *consts, *carry, *mine)
            return outs[: len(init)], outs[len(init) :]

        carry, ys = scan.run(step, init, (source_xs, own))
        return [*carry, *ys]

    closed = trace(fused, avals_of(operands))
    return builder.inline_closed(closed, operands, within=eqn)


def _run_all(eqns: Sequence[Any], consts: Sequence[Any], xs: Sequence[Any]) -> dict:
    made = {}
    for eqn, c, x in zip(eqns, consts, xs, strict=True):
        (body,) = bodies(eqn)
        made |= dict(zip(eqn.outvars, compat.evaluate(body, *c, *x), strict=True))
    return made


def _fuse_into_cond(builder: Builder, eqn: Any, producers: dict[Any, Any]) -> list:
    sources = _sources(eqn.invars[1:], producers)
    own = [a for a in eqn.invars[1:] if not (is_var(a) and a in producers)]
    groups = [*(e.invars[1:] for e in sources), own]

    def branch(index):
        def run(*values):
            *source_values, own_values = _take(groups, values)
            made = {}
            for source, args in zip(sources, source_values, strict=True):
                results = compat.evaluate(bodies(source)[index], *args)
                made |= dict(zip(source.outvars, results, strict=True))
            rest = iter(own_values)
            args = [
                made[a] if is_var(a) and a in made else next(rest)
                for a in eqn.invars[1:]
            ]
            return compat.evaluate(bodies(eqn)[index], *args)

        return run

    operands = [a for group in groups for a in group]
    branches = [branch(i) for i in range(len(bodies(eqn)))]
    return append_cond(builder, eqn, branches, operands)


def _take(groups: Sequence[Sequence[Any]], values: Sequence[Any]) -> list[list[Any]]:
    given = iter(values)
    return [[next(given) for _ in group] for group in groups]
