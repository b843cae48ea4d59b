"""A product of float8 tiles in a Pallas-Triton kernel, on Hopper's tensor cores.

Triton uses them only if a dot may add up in less than float32. Pallas' own lowering of
a product does not say so, and converts float8 to float16 first (jax 0.10 to 0.12). So
this is a primitive whose lowering does: its sums over up to 128 values are those of the
tensor cores, about 14 bits (arXiv:2412.19437, section 3.3.2), and the caller adds them
up in float32.

This is the only file that uses jax's private modules for kernels. Where they have
changed, the product is Pallas' own, which is slower, and a warning says so once.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import mlir

_MOST_INEXACT = 128  # values that may be added up inexactly, a tile's
_dot_p = jex_core.Primitive("float8_dot")


def float8_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies two tiles inside a kernel.

    Args:
      a: [m, k] float8_e4m3fn.
      b: [k, n] float8_e4m3fn.

    Returns:
      [m, n] float32.
    """
    if not _register():
        return _by_jax(a, b)
    return _dot_p.bind(a, b)


def _by_jax(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _exactly(a: jax.Array, b: jax.Array) -> jax.Array:
    """In the interpreter, and on every other platform."""
    return _by_jax(a.astype(jnp.float32), b.astype(jnp.float32))


@_dot_p.def_abstract_eval
def _abstract_eval(a: Any, b: Any) -> Any:
    shape = a.shape[0], b.shape[1]
    return jax.core.ShapedArray(shape, jnp.float32)  # pyright: ignore


_dot_p.def_impl(_exactly)
mlir.register_lowering(_dot_p, mlir.lower_fun(_exactly, multiple_results=False))


@functools.cache
def _register() -> bool:
    """Registers the lowering to Triton; returns whether this jax has what it takes."""
    try:
        from jax._src.lib.mlir import (
            ir,  # pyright: ignore[reportPrivateImportUsage]
        )
        from jax._src.lib.triton import dialect
        from jax._src.pallas.triton import lowering

        rules, zeros, dot = lowering.triton_lowering_rules, lowering._zeros, dialect.dot
    except (ImportError, AttributeError) as error:
        warnings.warn(
            "jax's private modules for Triton kernels have changed, so float8 products "
            "on GPUs are computed in float16, which is slower; use jax 0.10 to 0.12. "
            f"(jax {jax.__version__}: {type(error).__name__}: {error})",
            stacklevel=2,
        )
        return False

    def lower(ctx: Any, a: Any, b: Any) -> Any:
        del ctx
        if jax.default_backend() == "gpu":  # else for devices that are not here
            check_has_float8(jax.local_devices(backend="gpu")[0])
        (m, _), (_, n) = (ir.RankedTensorType(each.type).shape for each in (a, b))
        total = zeros(ir.RankedTensorType.get([m, n], ir.F32Type.get()))
        return dot(a, b, total, max_num_imprecise_acc=_MOST_INEXACT)

    rules[_dot_p] = lower
    return True


def check_has_float8(device: Any) -> None:
    """Raises unless a device can multiply float8, or is no NVIDIA GPU.

    Args:
      device: a `jax.Device`, also one that is only compiled for.

    Raises:
      ValueError: naming the GPU and what to use instead.
    """
    found = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not re.fullmatch(r"\d+\.\d+", found):
        return
    if tuple(map(int, found.split("."))) < (8, 9):
        raise ValueError(
            f"products in float8 need a GPU of compute capability 8.9 or more, but "
            f"{device.device_kind} has {found}; use products='plain'."
        )
