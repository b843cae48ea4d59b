"""Activations in float8 that can be differentiated, and shared by several products."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eplb_jax.products.quantize import quantize_tiles
from eplb_jax.products.scaled import Scaled, dequantize
from eplb_jax.products.varying import vary_alike


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scaled", "handle"],
    meta_fields=["powers_of_two"],
)
@dataclasses.dataclass(frozen=True)
class ScaledRows:
    """Activations in float8 that can be differentiated.

    Cotangents have the dtype of what they belong to, and float8 would not do for them.
    So there is a handle, of the dtype of the activations, for their cotangent alone:
    its values are zeros that nothing reads, and no compiled program has them.

    Attributes:
      scaled: [..., d] with scales of 1 x 128.
      handle: [..., d] zeros.
      powers_of_two: whether the scales are powers of two.
    """

    scaled: Scaled
    handle: jax.Array
    powers_of_two: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the activations."""
        return self.handle.shape

    def __len__(self) -> int:
        return len(self.handle)

    @property
    def dtype(self) -> Any:
        """The dtype of the activations."""
        return self.handle.dtype

    @property
    def flat(self) -> ScaledRows:
        """The same with one leading axis."""
        scaled = Scaled(*map(one_leading_axis, self.scaled))
        return dataclasses.replace(
            self, scaled=scaled, handle=one_leading_axis(self.handle)
        )


def one_leading_axis(x: jax.Array) -> jax.Array:
    """From [..., d] to [rows, d]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def scale_rows(x: jax.Array | ScaledRows, *, powers_of_two: bool = False) -> ScaledRows:
    """Quantizes activations for any number of products; differentiable.

    Args:
      x: [..., d]; what is quantized already stays as it is.
      powers_of_two: see `quantize_tiles`.
    """
    return x if isinstance(x, ScaledRows) else _scale_rows(powers_of_two, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scale_rows(powers_of_two: bool, x: jax.Array) -> ScaledRows:
    scaled = quantize_tiles(x, powers_of_two=powers_of_two)
    return rows_of(scaled, x.dtype, powers_of_two)


_scale_rows.defvjp(
    lambda powers_of_two, x: (_scale_rows(powers_of_two, x), None),
    lambda powers_of_two, saved, ct: (ct.handle,),
)


def rows_of(scaled: Scaled, dtype: Any, powers_of_two: bool = False) -> ScaledRows:
    """Returns activations that are quantized already.

    Args:
      scaled: [..., d] with scales of 1 x 128.
      dtype: of the activations.
      powers_of_two: whether the scales are powers of two.
    """
    handle = jnp.zeros(scaled.values.shape, dtype)
    return ScaledRows(scaled, vary_alike(handle, scaled)[0], powers_of_two)


def named_rows(rows: ScaledRows, name: str) -> ScaledRows:
    """Names the values and scales of rows, for policies of `jax.checkpoint`."""
    return dataclasses.replace(rows, scaled=checkpoint_name(rows.scaled, name))


def unscale_rows(x: jax.Array | ScaledRows) -> jax.Array:
    """Returns activations in their dtype, also if they are not quantized."""
    return _unscale_rows(x) if isinstance(x, ScaledRows) else x


@jax.custom_vjp
def _unscale_rows(rows: ScaledRows) -> jax.Array:
    return dequantize(rows.scaled, rows.dtype)


def _unscale_rows_forward(rows: ScaledRows) -> Any:
    return _unscale_rows(rows), RowsKind(rows.powers_of_two)


def _unscale_rows_backward(kind: RowsKind, ct: jax.Array) -> Any:
    return (cotangent_of_rows(ct, kind),)


_unscale_rows.defvjp(_unscale_rows_forward, _unscale_rows_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RowsKind:
    """What the cotangent of rows must know of them, beside arrays."""

    powers_of_two: bool


def cotangent_of_rows(ct: jax.Array, kind: RowsKind) -> ScaledRows:
    """Returns the cotangent of rows: that of their handle alone."""
    return ScaledRows(None, ct, kind.powers_of_two)  # pyright: ignore
