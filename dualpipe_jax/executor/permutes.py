"""Permutes of the user's functions, in a form that ranks may run at different times.

XLA has one `collective-permute` for the whole mesh, whatever axis `lax.ppermute` names.
On CPU devices all of them wait for each other in it. The ranks of a pipeline run
different tasks at one time, so a permute inside a stage would wait for ever, or
exchange values of different tasks. Other collectives wait for their own group only, as
`all_gather` does, which takes the permute's place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

from dualpipe_jax import compat
from dualpipe_jax.backward import jaxprs_in


def within_groups(jaxpr: Any) -> Any:
    """Returns a jaxpr, closed or open, whose permutes are gathers, at any depth.

    To be called inside `jax.shard_map`, as the function was traced.
    """
    eqns, changed = [], False
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive.name == "ppermute":
            eqns += _gathers(eqn)
        else:
            params = {name: _in_bodies(value) for name, value in eqn.params.items()}
            if all(value is eqn.params[name] for name, value in params.items()):
                eqns.append(eqn)
                continue
            bodies = (compat.open_jaxpr(body)[0] for body in jaxprs_in(params))
            effects = eqn.effects.union(*(body.effects for body in bodies))
            eqns.append(eqn.replace(params=params, effects=effects))
        changed = True
    return compat.with_equations(jaxpr, eqns) if changed else jaxpr


def _in_bodies(value: Any) -> Any:
    """Does the same in a parameter of an equation, if that is a body or several."""
    if isinstance(value, tuple | list) and any(True for _ in jaxprs_in({"": value})):
        bodies = tuple(map(_in_bodies, value))
        same = all(a is b for a, b in zip(bodies, value, strict=True))
        return value if same else bodies
    return within_groups(value) if hasattr(value, "eqns") else value


def _gathers(eqn: Any) -> list[Any]:
    """Returns equations that do what a permute does."""
    axis_name, perm = eqn.params["axis_name"], eqn.params["perm"]

    def permute(*values):
        position = lax.axis_index(axis_name)
        source = jnp.zeros((), jnp.int32)
        receives = jnp.zeros((), bool)
        for sender, receiver in perm:
            here = position == receiver
            source, receives = jnp.where(here, sender, source), receives | here
        results = []
        for value in values:
            rows = lax.all_gather(value, axis_name)
            row = lax.dynamic_index_in_dim(rows, source, keepdims=False)
            results.append(jnp.where(receives, row, jnp.zeros_like(row)))
        return results

    structs = [compat.struct(atom.aval) for atom in eqn.invars]
    inner, consts = compat.open_jaxpr(jax.make_jaxpr(permute)(*structs))
    assert not consts
    renamed = dict(zip(inner.invars, eqn.invars, strict=True))
    renamed |= dict(zip(inner.outvars, eqn.outvars, strict=True))

    def rename(atoms):
        return [
            atom if isinstance(atom, jex_core.Literal) else renamed.get(atom, atom)
            for atom in atoms
        ]

    return [
        each.replace(invars=rename(each.invars), outvars=rename(each.outvars))
        for each in inner.eqns
    ]
