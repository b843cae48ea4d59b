"""Which parameters are trained, and trees without the others.

A choice (the `trainable` argument) becomes one flag for each leaf; a tree without some
of its leaves has None in their place, which JAX and optax read as nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Flags = tuple[bool, ...]


def is_prefix(choice: Any) -> bool:
    """Whether a choice is a pytree of bools, and not an NNX filter."""
    leaves = jax.tree.leaves(choice)
    return bool(leaves) and all(isinstance(leaf, bool | np.bool_) for leaf in leaves)


def is_filter(choice: Any) -> bool:
    """Whether a choice is an NNX filter: a type, a tag, a function, or several."""
    if isinstance(choice, list | tuple):
        return any(map(is_filter, choice))
    return choice is ... or isinstance(choice, str) or callable(choice)


def check_choice(choice: Any, where: str) -> None:
    """Raises a `ValueError` unless it is a prefix of bools or an NNX filter."""
    if not is_prefix(choice) and not is_filter(choice):
        raise ValueError(
            f"{where}={choice!r:.60} must be a bool, a prefix of bools of the "
            "parameters' tree, or an NNX filter such as nnx.LoRAParam."
        )


def flags_of(choice: Any, tree: PyTree, where: str) -> Flags:
    """Returns for each leaf of a tree of parameters whether it is trained.

    Args:
      choice: None (all), a prefix of bools, or an NNX filter.
      tree: parameters, with or without NNX variables.
      where: what error messages call the choice.

    Raises:
      ValueError: if the choice is none of these, or not a prefix of the tree.
    """
    if choice is None:
        return (True,) * len(jax.tree.leaves(tree))
    if is_prefix(choice):
        try:
            flags = jax.tree.leaves(jax.tree.broadcast(choice, tree))
        except ValueError as error:
            raise ValueError(
                f"{where} is not a prefix of the parameters' tree: {error} Give one "
                "bool for a whole subtree, or one for each of its children."
            ) from error
        return tuple(map(bool, flags))
    check_choice(choice, where)
    return tuple(_filtered(choice, tree))


def _filtered(choice: Any, tree: PyTree) -> Iterable[bool]:
    from flax import nnx  # takes a second, and most choices need no filter

    predicate = nnx.filterlib.to_predicate(choice)
    nodes = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    for path, node in nodes:
        chosen = bool(predicate(tuple(map(_name, path)), node))
        yield from [chosen] * len(jax.tree.leaves(node))


def _name(key: Any) -> Any:
    """Returns a key of a path as NNX writes it: a name or a number."""
    names = (getattr(key, field, None) for field in ("key", "idx", "name"))
    return next((name for name in names if name is not None), str(key))


def select(tree: PyTree, flags: Flags, wanted: bool = True) -> PyTree:
    """Returns a tree with None at the leaves whose flag is not the wanted one.

    The tree may be a tuple of several trees of the structure that the flags are for.
    """
    leaves, treedef = jax.tree.flatten(tree)
    repeated = flags * (len(leaves) // len(flags)) if flags else ()
    return jax.tree.unflatten(
        treedef,
        [
            leaf if flag == wanted else None
            for leaf, flag in zip(leaves, repeated, strict=True)
        ],
    )


def combine(one: PyTree, other: PyTree) -> PyTree:
    """Returns the leaves of one tree, and those of another where the first has None."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None
    )


def differentiable(tree: PyTree) -> Flags:
    """Returns for each leaf of a tree whether it is floating, and so has a gradient."""
    return tuple(
        jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        for leaf in jax.tree.leaves(tree)
    )


def check_differentiated(
    trainable: Any, trained: PyTree, input_grads: bool, inputs: PyTree
) -> None:
    """Raises a `ValueError` if there is nothing to compute gradients of."""
    if input_grads and not any(differentiable(inputs)):
        raise ValueError(
            f"{input_grads=}, but inputs hold no floating array; integers such as "
            "tokens have no gradient: pass activations, or leave input_grads out."
        )
    if not input_grads and not any(differentiable(trained)):
        raise ValueError(
            f"{trainable=} selects no floating parameter, so that there is nothing to "
            "differentiate; select some, or use pipeline_forward."
        )
