"""Names the weight-gradient work of a backward pass, so that profiles can show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from dualpipe_jax import compat
from dualpipe_jax.backward.jaxprs import live_vars, map_bodies, scan_closure

SCOPE = "W"


def name_weights(jaxpr: Any, is_input_ct: Sequence[bool]) -> Any:
    """Puts all that no input cotangent needs into W's `jax.named_scope`, at any depth.

    Args:
      jaxpr: flat, without constants.
      is_input_ct: for each output, whether it is an input cotangent.
    """
    template = _template()
    needed = live_vars(jaxpr, is_input_ct)
    eqns = []
    for eqn in jaxpr.eqns:
        mask = [v in needed for v in eqn.outvars]
        if not any(mask):
            eqn = compat.within_scope(eqn, template)
        elif not all(mask):
            if eqn.primitive.name == "scan":
                mask = scan_closure(eqn, mask)
            eqn = map_bodies(eqn, lambda body, mask=mask: _body(body, mask))
        eqns.append(eqn)
    return compat.new_jaxpr(jaxpr.invars, jaxpr.outvars, eqns, jaxpr)


def _body(body: Any, mask: Sequence[bool]) -> Any:
    return name_weights(compat.open_jaxpr(body)[0], mask)


def _template() -> Any:
    """Returns an equation in the scope."""

    def scoped(x):
        with jax.named_scope(SCOPE):
            return x + 1

    return jax.make_jaxpr(scoped)(1).eqns[-1]
