"""What the public functions return: jitted functions with more to say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


class Jitted:
    """A jitted function: called, lowered, traced and exported as `jax.jit`'s are."""

    def __init__(self, function: Callable[..., Any]):
        functools.update_wrapper(self, function, assigned=("__name__",))
        self._jitted = jax.jit(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers the function for these arguments, or for arrays of their shapes.

        The compiled function takes arguments as they are given here: a `key` by
        position or by name, or none.
        """
        return self._jitted.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """Traces the function for these arguments; `jax.export` calls this."""
        return self._jitted.trace(*args, **kwargs)
