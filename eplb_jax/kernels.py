"""tokamax's kernels where a program is compiled for CUDA, other code elsewhere."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def has_tokamax() -> bool:
    """Whether tokamax is installed."""
    return importlib.util.find_spec("tokamax") is not None


def on_cuda(
    kernel: Callable[..., Any], otherwise: Callable[..., Any], *args: Any
) -> Any:
    """Calls one function when lowered for CUDA with tokamax there, else the other.

    Its derivative is that of the function which is called, and keeps nothing but
    `args`: what the backward pass needs beside them, it computes again.

    Args:
      kernel: what calls tokamax; it raises NotImplementedError or ValueError where
        tokamax has no kernel for the case, and `otherwise` takes its place (a process
        with GPUs warns).
      otherwise: the same function of `args` without kernels.
      *args: arrays; those of integers have no derivative.

    Returns:
      What the chosen function returns.

    Examples:
      >>> on_cuda(lambda x: x + 2, lambda x: x + 1, jax.numpy.zeros(2)).tolist()
      [1.0, 1.0]
    """
    if not has_tokamax():
        return otherwise(*args)
    return _on_cuda(kernel, otherwise, args)


# AD would go through the choice, and keep what either side keeps.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_cuda(kernel: Callable, otherwise: Callable, args: tuple[Any, ...]) -> Any:
    return _choose(kernel, otherwise, args)


def _forward(kernel: Callable, otherwise: Callable, args: tuple[Any, ...]) -> Any:
    return _choose(kernel, otherwise, args), args


def _backward(kernel: Callable, otherwise: Callable, args: tuple, ct: Any) -> Any:
    def pullback(function: Callable[..., Any]) -> Callable[..., Any]:
        def pull(*operands: Any) -> Any:
            *args, ct = operands
            is_float = [jnp.issubdtype(arg.dtype, jnp.inexact) for arg in args]
            fixed = [None if f else arg for f, arg in zip(is_float, args, strict=True)]

            def of_floats(*floats: Any) -> Any:
                rest = iter(floats)
                return function(*(next(rest) if a is None else a for a in fixed))

            floats = [arg for f, arg in zip(is_float, args, strict=True) if f]
            return jax.vjp(of_floats, *floats)[1](ct)

        return pull

    cts = iter(_choose(pullback(kernel), pullback(otherwise), (*args, ct)))
    # None stands for the zeros of integers.
    is_float = (jnp.issubdtype(arg.dtype, jnp.inexact) for arg in args)
    return (tuple(next(cts) if f else None for f in is_float),)


_on_cuda.defvjp(_forward, _backward)


def _choose(kernel: Callable, otherwise: Callable, args: tuple[Any, ...]) -> Any:
    def attempt(*args: Any) -> Any:
        # Traced on every host, GPUs or not; what tokamax says then depends on its
        # version.
        try:
            return kernel(*args)
        except (NotImplementedError, ValueError) as error:
            if _wants_kernels():
                warnings.warn(
                    "tokamax has no kernel here, so slower code takes its place on "
                    f"GPUs: {error}",
                    stacklevel=2,
                )
            return otherwise(*args)

    return lax.platform_dependent(*args, cuda=attempt, default=otherwise)


@contextlib.contextmanager
def cross_compiling():
    """Within it, tokamax gives its kernels though this process has no GPU.

    For a compile-only mesh; on a process with GPUs, and without tokamax, it does
    nothing. `jax.jit` traces late: the block must hold the call of `lower`, or stand
    inside the function.
    """
    if not has_tokamax() or jax.default_backend() == "gpu":
        yield
        return
    import tokamax  # pyright: ignore[reportMissingImports]

    with tokamax.config.cross_compile(True):
        yield


def _wants_kernels() -> bool:
    if jax.default_backend() == "gpu":
        return True
    import tokamax  # pyright: ignore[reportMissingImports]

    return bool(tokamax.config.cross_compile.value)
