"""Checks that a user's function leaves the pipeline's axis to the pipeline.

The ranks of a pipeline run different tasks at one time. A collective over their axis
inside a stage would combine different microbatches, or wait for ranks that never call
it; a rank's position on the axis does not tell its stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dualpipe_jax import compat
from dualpipe_jax.backward import jaxprs_in


def check_axis_is_free(jaxpr: Any, axis_name: str, function: str):
    """Raises a `ValueError` if a traced function uses the pipeline's axis.

    Args:
      jaxpr: closed or open; loops, branches and calls in it are searched too.
      axis_name: the pipeline's axis.
      function: which of the user's functions it is, for the message.
    """
    name = next(uses_of_axis(jaxpr, axis_name), None)
    if name is None:
        return
    if name == "axis_index":
        remedy = (
            "A rank may run several stages; put what differs between them into "
            "params.stages, which have an entry for each stage."
        )
    else:
        remedy = (
            "Reduce over the mesh's other axes only: the step itself sums losses and "
            "gradients over its ranks."
        )
    raise ValueError(
        f"{function} uses {name} over {axis_name!r}, the pipeline's axis, whose ranks "
        f"run different tasks at one time. {remedy}"
    )


def uses_of_axis(jaxpr: Any, axis_name: str) -> Iterator[str]:
    """Yields the names of the primitives that use a mesh axis, at any depth."""
    inner, _ = compat.open_jaxpr(jaxpr)
    for eqn in inner.eqns:
        found = False
        for body in jaxprs_in(eqn.params):
            for name in uses_of_axis(body, axis_name):
                found = True
                yield name
        if not found and axis_name in compat.axes_used(eqn):
            yield eqn.primitive.name
