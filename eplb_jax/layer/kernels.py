"""tokamax's kernels where a program is compiled for CUDA, other code elsewhere."""

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
    """Whether tokamax is installed."""
    return importlib.util.find_spec("tokamax") is not None


def load_tokamax() -> Any:
    """The module tokamax, which must be installed.

    It reads its settings with absl, which would read the command line, take our
    options for its own and end the process. Who uses absl has had it read by now.
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
    """Calls one function when lowered for CUDA with tokamax there, else the other.

    Args:
      kernel: what calls tokamax; it raises NotImplementedError or ValueError where
        tokamax has no kernel for the case, and `otherwise` takes its place (a process
        with GPUs warns).
      otherwise: the same function of `args` without kernels.
      *args: arrays; those of integers have no derivative.
      keep: for the backward pass, keep what the kernel wants kept, beside `args`; else
        what it needs beside them is computed again, as `otherwise` always does.

    Returns:
      What the chosen function returns.

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
    """What a call has to say to its backward pass; see `on_cuda`.

    Attributes:
      keep: see there; set to False where there is no kernel.
      pullback: the structure of the kernel's pullback, set when the forward pass is
        traced, which is before the backward pass is.
    """

    kernel: Callable[..., Any]
    otherwise: Callable[..., Any]
    keep: bool
    is_cross_compiling: bool
    pullback: Any = None

    def make(self, kernel: Callable[..., Any], otherwise: Callable[..., Any], *args):
        def attempt(*args: Any) -> Any:
            # Traced on every host, GPUs or not; what tokamax says then depends on its
            # version. A backward pass is traced where `cross_compiling` may have ended.
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


# AD would go through the choice, and keep what either side keeps.
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
            choice.keep = False  # there is no kernel to keep something for
    if not choice.keep:
        return _on_cuda(choice, args), (args, ())

    def without(*args: Any) -> Any:
        # Nothing is kept, in the shapes of what would be.
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
    # None stands for the zeros of integers.
    return (tuple(next(cts) if _is_float(arg) else None for arg in args),)


_on_cuda.defvjp(_forward, _backward)


def _pullback_of(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """As `jax.vjp`, for the arguments that are not integers."""

    def of_floats(*floats: Any) -> Any:
        rest = iter(floats)
        return function(*(next(rest) if _is_float(arg) else arg for arg in args))

    return jax.vjp(of_floats, *(arg for arg in args if _is_float(arg)))


def _is_float(arg: Any) -> bool:
    return jnp.issubdtype(arg.dtype, jnp.inexact)


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
    with load_tokamax().config.cross_compile(True):
        yield


def _is_cross_compiling() -> bool:
    if importlib.util.find_spec("tokamax") is None:
        return False
    return bool(load_tokamax().config.cross_compile.value)
