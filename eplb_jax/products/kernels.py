"""tokamax's kernels in programs compiled for CUDA, and other code elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def has_tokamax() -> bool:
    """Returns whether tokamax is installed."""
    return importlib.util.find_spec("tokamax") is not None


def load_tokamax() -> Any:
    """Imports tokamax, which must be installed.

    tokamax reads its settings with absl, which would parse this program's command line,
    reject its options and end the process. So absl's flags are marked as parsed;
    programs that use absl have parsed them by now.
    """
    import tokamax  # pyright: ignore[reportMissingImports]
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return tokamax


def on_cuda(
    kernel: Callable[..., Any],
    otherwise: Callable[..., Any],
    *args: Any,
    keep: bool = False,
) -> Any:
    """Calls `kernel` when lowered for CUDA with tokamax installed, else `otherwise`.

    Args:
      kernel: a function that calls tokamax. If it raises NotImplementedError or
        ValueError, because tokamax has no kernel for the case, `otherwise` takes its
        place (a process with GPUs warns).
      otherwise: the same function of `args` without kernels.
      *args: arrays; integer arrays have no derivative.
      keep: whether to keep the kernel's residuals for the backward pass, in addition to
        `args`; else they are computed again, as those of `otherwise` always are.

    Returns:
      The result of the function that was called.

    Examples:
      >>> on_cuda(lambda x: x + 2, lambda x: x + 1, jax.numpy.zeros(2)).tolist()
      [1.0, 1.0]
    """
    if not has_tokamax():
        return otherwise(*args)
    choice = _Choice(kernel, otherwise, keep, _is_cross_compiling())
    return _on_cuda(choice, args)


@dataclasses.dataclass(eq=False)
class _Choice:
    """What a call's forward pass hands to its backward pass; see `on_cuda`.

    Attributes:
      kernel: see `on_cuda`.
      otherwise: see `on_cuda`.
      keep: see `on_cuda`; set to False if there is no kernel.
      is_cross_compiling: whether the forward pass was traced in `cross_compiling`.
      pullback: the structure of the kernel's pullback, set when the forward pass is
        traced, which happens before the backward pass is traced.
    """

    kernel: Callable[..., Any]
    otherwise: Callable[..., Any]
    keep: bool
    is_cross_compiling: bool
    pullback: Any = None

    def make(self, kernel: Callable[..., Any], otherwise: Callable[..., Any], *args):
        def attempt(*args: Any) -> Any:
            # Traced on every host, with or without GPUs; which error tokamax raises
            # depends on its version. A backward pass may be traced after the block of
            # `cross_compiling` has ended.
            cross = self.is_cross_compiling
            try:
                with cross_compiling() if cross else contextlib.nullcontext():
                    return kernel(*args)
            except (NotImplementedError, ValueError) as error:
                if cross or jax.default_backend() == "gpu":
                    warnings.warn(
                        "tokamax has no kernel here, so slower code takes its place on "
                        f"GPUs: {error}",
                        stacklevel=2,
                    )
                return otherwise(*args)

        return lax.platform_dependent(*args, cuda=attempt, default=otherwise)


# Plain AD would differentiate both branches, and keep the residuals of both.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_cuda(choice: _Choice, args: tuple[Any, ...]) -> Any:
    return choice.make(choice.kernel, choice.otherwise, *args)


def _forward(choice: _Choice, args: tuple[Any, ...]) -> Any:
    def by_kernel(*args: Any) -> Any:
        result, pullback = _pullback_of(choice.kernel, args)
        kept, choice.pullback = jax.tree.flatten(pullback)
        return result, kept

    shapes = []
    if choice.keep:
        try:
            with cross_compiling():
                shapes = jax.eval_shape(by_kernel, *args)[1]
        except (NotImplementedError, ValueError):
            choice.keep = False  # there is no kernel, so no residuals of one
    if not choice.keep:
        return _on_cuda(choice, args), (args, ())

    def without(*args: Any) -> Any:
        # Zeros in place of the kernel's residuals: both branches return one structure.
        return choice.otherwise(*args), [jnp.zeros(k.shape, k.dtype) for k in shapes]

    result, kept = choice.make(by_kernel, without, *args)
    return result, (args, kept)


def _backward(choice: _Choice, saved: Any, ct: Any) -> Any:
    args, kept = saved

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        def pull(args: tuple, kept: list, ct: Any) -> Any:
            del kept
            return _pullback_of(function, args)[1](ct)

        return pull

    def pull_kept(args: tuple, kept: list, ct: Any) -> Any:
        del args
        return jax.tree.unflatten(choice.pullback, kept)(ct)

    by_kernel = pull_kept if choice.keep else again(choice.kernel)
    cts = iter(choice.make(by_kernel, again(choice.otherwise), args, kept, ct))
    # None is the zero cotangent of an integer array.
    return (tuple(next(cts) if _is_float(arg) else None for arg in args),)


_on_cuda.defvjp(_forward, _backward)


def _pullback_of(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Calls `jax.vjp` with respect to the arguments that are not integers."""

    def of_floats(*floats: Any) -> Any:
        rest = iter(floats)
        return function(*(next(rest) if _is_float(arg) else arg for arg in args))

    return jax.vjp(of_floats, *(arg for arg in args if _is_float(arg)))


def _is_float(arg: Any) -> bool:
    return jnp.issubdtype(arg.dtype, jnp.inexact)


@contextlib.contextmanager
def cross_compiling():
    """Enables tokamax's kernels in a process that has no GPU.

    For programs compiled for a compile-only mesh; in a process with GPUs, or without
    tokamax, it does nothing. `jax.jit` traces late: the block must contain the call of
    `lower`, or be inside the jitted function.
    """
    if not has_tokamax() or jax.default_backend() == "gpu":
        yield
        return
    with load_tokamax().config.cross_compile(True):
        yield


def _is_cross_compiling() -> bool:
    if not has_tokamax():
        return False
    return bool(load_tokamax().config.cross_compile.value)
