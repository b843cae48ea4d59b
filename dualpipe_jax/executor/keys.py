"""Random keys: each of the user's functions gets its own, if it takes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax


def takes_key(fn: Callable[..., Any]) -> bool:
    """Whether a function can be called with `key=`."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return any(
        p.kind is p.VAR_KEYWORD or (p.name == "key" and p.kind is not p.POSITIONAL_ONLY)
        for p in parameters
    )


def with_key(fn: Callable[..., Any], key: jax.Array | None, *args: Any) -> Any:
    """Calls a function of the user, with `key=` if there is one and it takes one."""
    # Flax's variables refuse writes in another trace than that of their making: a
    # function gets its own.
    args = jax.tree.map(lambda leaf: leaf, args)
    if key is None or not takes_key(fn):
        return fn(*args)
    return fn(*args, key=key)


def check_key(key: Any, fns: Sequence[Callable[..., Any] | None]) -> None:
    """Raises a `ValueError` if a key is passed that no function takes."""
    if key is None or any(fn is not None and takes_key(fn) for fn in fns):
        return
    raise ValueError(
        "key was passed, but none of the pipeline's functions has a parameter `key`; "
        "add one to those that draw random numbers (def stage_fn(params, x, *, key)), "
        "or leave key out."
    )
