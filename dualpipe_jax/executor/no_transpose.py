"""An identity with tangents but without cotangents.

A step computes gradients itself, in an order that reverse-mode AD cannot follow. JAX
would say so with a sentence about loops; this says what to do instead.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

PyTree = Any


def refuse_transpose(tree: PyTree, message: str) -> PyTree:
    """Returns the tree; reverse-mode differentiation of it raises a `ValueError`."""
    return jax.tree.map(
        lambda leaf: (
            _identity.bind(leaf, message=message)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
            else leaf
        ),
        tree,
    )


def _same(x: Any, *, message: str) -> Any:
    del message
    return x


def _refuse(cotangent: Any, x: Any, *, message: str) -> Any:
    del cotangent, x
    raise ValueError(message)


_identity = Primitive("refuse_transpose")
_identity.def_impl(_same)
_identity.def_abstract_eval(_same)
ad.deflinear2(_identity, _refuse)
batching.defvectorized(_identity)
mlir.register_lowering(_identity, mlir.lower_fun(_same, multiple_results=False))
