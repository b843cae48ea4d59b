"""Loads: checked, and on a scale where sums neither overflow nor vanish.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from eplb_jax.placement.arrays import put_like
from eplb_jax.placement.checks import is_traced

_LOADS = "weight must be finite and not negative"
# The largest load of a layer: sums of 2^16 such are finite, and a load less than it by
# a factor of 2^200 is no denormal number.
_TOP = 100
# float32: 1 sign, 8 exponent, 23 fraction bits.
_FRACTION = 23
_BIAS = 127
_INFINITY = 0x7F800000


def as_loads(weight: Any, check_values: bool = False) -> jax.Array:
    """Converts loads to float32 on a common scale, and checks what can be checked.

    Plans and scores do not depend on the scale of the loads. Each layer is multiplied
    by the power of two that `scale_loads` chooses, so that what follows neither
    overflows nor vanishes, and rounds as without it.

    Args:
      weight: [layers, experts] loads, such as token counts.
      check_values: also check traced values, with checkify.

    Returns:
      [layers, experts] float32. Inside jit, loads that are negative or not finite
      count as zero.

    Raises:
      ValueError: for a wrong rank or dtype, and outside jit for a NaN, an infinity or
        a negative load.

    Examples:
      >>> as_loads([[1, -2]])
      Traceback (most recent call last):
        ...
      ValueError: weight must be finite and not negative, but weight[0, 1] is -2.0; ...
    """
    values = check_loads(weight, check_values)
    if is_traced(values):
        return scale_loads(values)
    scaled = scale_loads(np.asarray(values))
    if isinstance(values, jax.Array):
        return put_like(scaled, values)
    return jnp.asarray(scaled)


def check_loads(weight: Any, check_values: bool = False) -> np.ndarray | jax.Array:
    """Converts loads to float32 and checks them, as `as_loads` does, without scaling.

    Args:
      weight: see `as_loads`.
      check_values: see `as_loads`.

    Returns:
      [layers, experts] float32.

    Raises:
      ValueError: see `as_loads`.

    Examples:
      >>> check_loads([[1j, 2]])
      Traceback (most recent call last):
        ...
      ValueError: weight is complex128[1, 2], but loads are real numbers, ...
    """
    if not isinstance(weight, jax.Array):
        weight = np.asarray(weight)
    if weight.ndim != 2:
        raise ValueError(
            f"weight has shape {weight.shape}, but it must be [layers, experts]; use "
            "weight[None] for one layer, or sum windows over their axis first."
        )
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(weight.dtype, kind) for kind in kinds):
        raise ValueError(
            f"weight is {weight.dtype}{list(weight.shape)}, but loads are real "
            "numbers, such as token counts."
        )
    if is_traced(weight):
        if check_values:
            is_good = jnp.all(jnp.isfinite(weight) & (weight >= 0))
            checkify.check(is_good, f"{_LOADS}; check the counts that made it.")
        return weight.astype(jnp.float32)
    with np.errstate(over="ignore"):
        values = np.asarray(weight).astype(np.float32)
    is_bad = ~(np.isfinite(values) & (values >= 0))
    if is_bad.any():
        layer, expert = np.argwhere(is_bad)[0]
        raise ValueError(
            f"{_LOADS}, but weight[{layer}, {expert}] is {values[layer, expert]}; "
            "check the counts that made it."
        )
    return weight.astype(jnp.float32) if isinstance(weight, jax.Array) else values


def scale_loads(weight_LE: Any) -> Any:
    """Multiplies each layer by a power of two: its largest load is then about 2^100.

    Greedy placement, search and scores give the same for all multiples of the loads by
    powers of two, as long as no number on the way overflows or is denormal (many
    processors take those for zero). So numbers are read as integers here.

    Args:
      weight_LE: [layers, experts] float32, of numpy or jax. Negative loads, NaN and
        infinities count as zero.

    Returns:
      [layers, experts] float32.

    Examples:
      >>> scale_loads(np.array([[3.0, 1.5], [2.0**-149, 0.0]], np.float32)) / 2.0**100
      array([[1.5 , 0.75],
             [1.  , 0.  ]], dtype=float32)
    """
    of = np if isinstance(weight_LE, np.ndarray) else jnp
    bits_LE = _as_bits(weight_LE)
    is_load_LE = (bits_LE > 0) & (bits_LE < _INFINITY)
    bits_LE = of.where(is_load_LE, bits_LE, 0)
    exponent_LE = bits_LE >> _FRACTION
    digits_LE = bits_LE & ((1 << _FRACTION) - 1)
    # A normal number has a leading one that is not written.
    digits_LE = of.where(exponent_LE > 0, digits_LE | (1 << _FRACTION), digits_LE)
    digits_LE = digits_LE.astype(of.float32)
    exponent_LE = of.maximum(exponent_LE, 1)
    # Each load is digits * 2^(exponent + constant), and its first digit is at:
    first_LE = (_as_bits(digits_LE) >> _FRACTION) - _BIAS + exponent_LE
    power_LE = _TOP + exponent_LE - first_LE.max(axis=1, keepdims=True)
    # 2^-127 would be denormal; its bits here are those of zero.
    factor_LE = of.clip(power_LE + _BIAS, 0, 2 * _BIAS) << _FRACTION
    return digits_LE * _as_numbers(factor_LE)


def _as_bits(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.view(np.int32)
    return jax.lax.bitcast_convert_type(value, jnp.int32)


def _as_numbers(bits: Any) -> Any:
    if isinstance(bits, np.ndarray):
        return bits.view(np.float32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
