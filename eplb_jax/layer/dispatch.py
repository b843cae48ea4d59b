"""Tokens to the slots of their experts, and the experts' outputs back.

`plan_dispatch` turns the slot of every choice into a `Dispatch`: integers that say
where each row goes. `send` brings the tokens to their slots, grouped by slot, and
`combine` adds the results up again where the tokens are; `dispatch_choices` and `fetch` do
the same with one row for each choice. In both pairs each is the transpose of the other,
so gradients go the same ways. Nothing is dropped, unless a buffer is made smaller than
what may come; then what does not fit counts as overflow, and its result is zero.

Shape suffixes: T tokens, K choices of a token, N = T * K rows sent, D devices,
S slots, I slots of this device, M rows of the buffer at the slots.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.layer.axes import Axis, all_gather, axis_index, psum
from eplb_jax.layer.exchange import Segments, Transport, exchange
from eplb_jax.layer.routing import count_experts
from eplb_jax.layer.varying import is_typed
from eplb_jax.placement import take_or_zero

Payload = Literal["plain", "fp8"]

# DeepSeek-V3 sends activations in tiles of 1 x 128 (arXiv:2412.19437, section 3.3.2).
_TILE = 128
_LARGEST_FP8 = 448.0


class Dispatch(NamedTuple):
    """Where the rows of this device's choices go, and what arrives here.

    Attributes:
      order: [rows sent] int32, the choices by slot; those without one come last, and
        are left out where fewer rows are sent.
      inverse: [tokens * k] int32, the place of each choice in that order.
      segments: rows from device to device; None on one device.
      to_group: [rows] int32, which received row each row of the buffer is.
      from_group: [rows] int32, the reverse. Both are out of range for empty rows.
      group_sizes: [slots of this device] int32, rows of the buffer for each.
      tokens_per_physical_expert: [slots] int32, choices of all devices for each slot.
      overflow: [] int32, choices of all devices that found no room.
    """

    order: jax.Array
    inverse: jax.Array
    segments: Segments | None
    to_group: jax.Array
    from_group: jax.Array
    group_sizes: jax.Array
    tokens_per_physical_expert: jax.Array
    overflow: jax.Array


def plan_dispatch(
    slots: jax.Array,
    num_slots: int,
    *,
    num_devices: int = 1,
    axis_name: Axis | None = None,
    num_rows: int | None = None,
    num_sent: int | None = None,
) -> Dispatch:
    """Plans the way of every choice of every token.

    Args:
      slots: [tokens, k] int32, see `choose_physical_experts`; -1 goes nowhere.
      num_slots: slots of all devices.
      num_devices: devices that the slots are divided among, in order.
      axis_name: mesh axis of the devices, inside `jax.shard_map`, or groups of them;
        None on one device.
      num_rows: rows of a device's buffer; None: as many as can come, which is
        num_devices * tokens * min(k, slots of a device). Rows that stay empty cost
        memory and no arithmetic (`grouped_matmul`).
      num_sent: rows that a device sends; None: as many as there are choices. For
        choices most of which go nowhere.

    Returns:
      A `Dispatch`.

    Raises:
      ValueError: for devices that do not divide the slots, several devices without an
        axis, and `num_rows` or `num_sent` below 1.

    Examples:
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> plan.order.tolist(), plan.group_sizes.tolist(), int(plan.overflow)
      ([1, 2, 0, 3], [2, 0, 1], 0)
    """
    _check_plan(num_slots, num_devices, axis_name, num_rows, num_sent)
    num_tokens, k = slots.shape
    slot_N = slots.reshape(-1)
    key_N = jnp.where(slot_N < 0, num_slots, slot_N)
    order_N = jnp.argsort(key_N, stable=True).astype(jnp.int32)
    position_N = jnp.arange(len(order_N), dtype=jnp.int32)
    inverse_N = jnp.zeros_like(position_N).at[order_N].set(position_N)
    count_S = count_experts(slots, num_slots)
    per_device = num_slots // num_devices
    if axis_name is None:
        count_DDI, me = count_S[None, None], 0
    else:
        count_DDI = all_gather(count_S, axis_name)
        count_DDI = count_DDI.reshape(num_devices, num_devices, per_device)
        me = axis_index(axis_name)
    if num_rows is None:
        num_rows = num_devices * num_tokens * min(k, per_device)

    num_sent = len(order_N) if num_sent is None else min(num_sent, len(order_N))
    asked_DD = count_DDI.sum(axis=2, dtype=jnp.int32)
    starts_DD = jnp.cumsum(asked_DD, axis=1) - asked_DD
    sent_DD = jnp.clip(num_sent - starts_DD, 0, asked_DD)
    starts_DD = jnp.minimum(starts_DD, num_sent)
    before_DD = jnp.cumsum(sent_DD, axis=0) - sent_DD
    sizes_DD = jnp.clip(num_rows - before_DD, 0, sent_DD)
    places_DD = jnp.cumsum(sizes_DD, axis=0) - sizes_DD
    # What arrives here: by device, then by slot; and grouped: by slot, then by device.
    arrived_DI = count_DDI[:, me]
    skipped_DI = jnp.cumsum(arrived_DI, axis=1) - arrived_DI
    arrived_DI = jnp.clip(sizes_DD[:, me][:, None] - skipped_DI, 0, arrived_DI)
    received_DI = places_DD[:, me][:, None] + skipped_DI
    flat_ID = arrived_DI.T.reshape(-1)
    grouped_DI = (jnp.cumsum(flat_ID) - flat_ID).reshape(arrived_DI.T.shape).T

    # What everyone has counted is here: no need to add it up over the devices.
    tokens_per_physical_expert = count_DDI.sum(axis=0, dtype=jnp.int32).reshape(-1)
    overflow = (asked_DD - sizes_DD).sum(dtype=jnp.int32)
    if axis_name is not None and is_typed(count_S):
        # Unless types are to tell that all devices have the same.
        tokens_per_physical_expert = psum(count_S, axis_name)
        overflow = psum((asked_DD - sizes_DD)[me].sum(dtype=jnp.int32), axis_name)
    segments = None
    if axis_name is not None:
        segments = Segments(sizes_DD, starts_DD, places_DD)
    return Dispatch(
        order=order_N[:num_sent],
        inverse=inverse_N,
        segments=segments,
        to_group=_shifted((received_DI - grouped_DI).T, arrived_DI.T, num_rows),
        from_group=_shifted(grouped_DI - received_DI, arrived_DI, num_rows),
        group_sizes=arrived_DI.sum(axis=0, dtype=jnp.int32),
        tokens_per_physical_expert=tokens_per_physical_expert,
        overflow=overflow,
    )


def send(
    x: jax.Array,
    plan: Dispatch,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
    payload: Payload = "plain",
) -> jax.Array:
    """Brings each token to the slots of its choices.

    Args:
      x: [tokens, d].
      plan: of `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.
      payload: `"fp8"` sends float8_e4m3fn with a float32 scale for every 128
        channels; gradients come back as they are.

    Returns:
      [rows, d], grouped by the slots of this device; empty rows are zero.

    Raises:
      ValueError: for an unknown payload or transport, and for `"fp8"` where 128 does
        not divide d.

    Examples:
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> send(jnp.array([[1.0], [2.0]]), plan).ravel().tolist()
      [1.0, 2.0, 1.0, 0.0]
    """
    if payload not in get_args(Payload):
        raise ValueError(f"{payload=} must be one of {', '.join(get_args(Payload))}.")
    if payload == "fp8" and x.shape[1] % _TILE:
        raise ValueError(
            f"payload='fp8' scales tiles of {_TILE} channels, which do not divide "
            f"x.shape[1]={x.shape[1]}; use payload='plain'."
        )
    return _send(x, plan, axis_name, transport, payload)


def combine(
    rows: jax.Array,
    plan: Dispatch,
    num_tokens: int,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
) -> jax.Array:
    """Brings the results back to the tokens that asked for them, and adds them up.

    Args:
      rows: [rows, d], grouped by slot like the result of `send`.
      plan: of `plan_dispatch`.
      num_tokens: of this device.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [tokens, d], the sum over each token's choices, taken in float32; what went
      nowhere adds nothing.

    Examples:
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> combine(jnp.array([[5.0], [6.0], [7.0], [8.0]]), plan, 2).ravel().tolist()
      [12.0, 6.0]
    """
    return _combine(rows, plan, num_tokens, axis_name, transport)


def dispatch_choices(
    values: jax.Array,
    plan: Dispatch,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
) -> jax.Array:
    """Brings something of each choice, its weight for instance, to the choice's slot.

    Args:
      values: [tokens * k, d], choice by choice.
      plan: of `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [rows, d], in the order of the result of `send`; empty rows are zero.

    Examples:
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> values = jnp.array([[5.0], [6.0], [7.0], [8.0]])
      >>> dispatch_choices(values, plan).ravel().tolist()
      [6.0, 7.0, 5.0, 0.0]
    """
    return _send_choices(values, plan, axis_name, transport)


def fetch(
    rows: jax.Array,
    plan: Dispatch,
    *,
    axis_name: Axis | None = None,
    transport: Transport = "auto",
) -> jax.Array:
    """Brings the results back choice by choice, for who weights them himself.

    Args:
      rows: [rows, d], grouped by slot like the result of `send`.
      plan: of `plan_dispatch`.
      axis_name: as in `plan_dispatch`.
      transport: see `exchange`.

    Returns:
      [tokens * k, d], choice by choice; zero for those that went nowhere.

    Examples:
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> fetch(jnp.array([[5.0], [6.0], [7.0], [8.0]]), plan).ravel().tolist()
      [7.0, 5.0, 6.0, 0.0]
    """
    return _fetch(rows, plan, axis_name, transport)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _send(
    x: jax.Array,
    plan: Dispatch,
    axis_name: Axis | None,
    transport: Transport,
    payload: Payload,
) -> jax.Array:
    token_N = plan.order // (len(plan.inverse) // len(x))
    if payload == "plain":
        return _to_slots(x[token_N], plan, axis_name, transport)
    tile_T = x.astype(jnp.float32).reshape(len(x), -1, _TILE)
    scale_T = jnp.abs(tile_T).max(axis=-1, keepdims=True) / _LARGEST_FP8
    scale_T = jnp.where(scale_T > 0, scale_T, 1.0)
    small_T = (tile_T / scale_T).astype(jnp.float8_e4m3fn).reshape(x.shape)
    # As bytes, not every backend's collectives know the type; and in one row, since a
    # small exchange of its own costs as much time as the network's latency.
    bytes_T = jnp.concatenate(
        [lax.bitcast_convert_type(small_T, jnp.uint8), _as_bytes(scale_T[..., 0])],
        axis=1,
    )
    bytes_M = _to_slots(bytes_T[token_N], plan, axis_name, transport)
    small_M, scale_M = jnp.split(bytes_M, [x.shape[1]], axis=1)
    small_M = lax.bitcast_convert_type(small_M, jnp.float8_e4m3fn)
    scale_M = scale_M.reshape(len(bytes_M), -1, 4)
    scale_M = lax.bitcast_convert_type(scale_M, jnp.float32)[..., None]
    tile_M = small_M.astype(jnp.float32).reshape(len(bytes_M), -1, _TILE) * scale_M
    return tile_M.reshape(small_M.shape).astype(x.dtype)


def _as_bytes(x: jax.Array) -> jax.Array:
    """[n, m] float32 -> [n, 4 m] uint8."""
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(len(x), -1)


def _send_forward(
    x: jax.Array,
    plan: Dispatch,
    axis_name: Axis | None,
    transport: Transport,
    payload: Payload,
) -> Any:
    return _send(x, plan, axis_name, transport, payload), (plan, len(x))


def _send_backward(
    axis_name: Axis | None,
    transport: Transport,
    payload: Payload,
    saved: Any,
    ct: jax.Array,
) -> Any:
    del payload
    plan, num_tokens = saved
    with jax.named_scope("dispatch"):
        return _sum_at_tokens(ct, plan, num_tokens, axis_name, transport), None


_send.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _combine(
    rows: jax.Array,
    plan: Dispatch,
    num_tokens: int,
    axis_name: Axis | None,
    transport: Transport,
) -> jax.Array:
    return _sum_at_tokens(rows, plan, num_tokens, axis_name, transport)


def _combine_forward(
    rows: jax.Array,
    plan: Dispatch,
    num_tokens: int,
    axis_name: Axis | None,
    transport: Transport,
) -> Any:
    return _combine(rows, plan, num_tokens, axis_name, transport), plan


def _combine_backward(
    num_tokens: int,
    axis_name: Axis | None,
    transport: Transport,
    plan: Dispatch,
    ct: jax.Array,
) -> Any:
    del num_tokens
    with jax.named_scope("combine"):
        return _send(ct, plan, axis_name, transport, "plain"), None


_combine.defvjp(_combine_forward, _combine_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _send_choices(
    values: jax.Array, plan: Dispatch, axis_name: Axis | None, transport: Transport
) -> jax.Array:
    return _to_slots(values[plan.order], plan, axis_name, transport)


def _send_choices_forward(
    values: jax.Array, plan: Dispatch, axis_name: Axis | None, transport: Transport
) -> Any:
    return _send_choices(values, plan, axis_name, transport), plan


def _send_choices_backward(
    axis_name: Axis | None, transport: Transport, plan: Dispatch, ct: jax.Array
) -> Any:
    return _fetch(ct, plan, axis_name, transport), None


_send_choices.defvjp(_send_choices_forward, _send_choices_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fetch(
    rows: jax.Array, plan: Dispatch, axis_name: Axis | None, transport: Transport
) -> jax.Array:
    return _from_slots(rows, plan, axis_name, transport)


def _fetch_forward(
    rows: jax.Array, plan: Dispatch, axis_name: Axis | None, transport: Transport
) -> Any:
    return _fetch(rows, plan, axis_name, transport), plan


def _fetch_backward(
    axis_name: Axis | None, transport: Transport, plan: Dispatch, ct: jax.Array
) -> Any:
    return _send_choices(ct, plan, axis_name, transport), None


_fetch.defvjp(_fetch_forward, _fetch_backward)


def _sum_at_tokens(
    rows_M: jax.Array,
    plan: Dispatch,
    num_tokens: int,
    axis_name: Axis | None,
    transport: Transport,
) -> jax.Array:
    row_N = _from_slots(rows_M, plan, axis_name, transport)
    row_TKF = row_N.reshape(num_tokens, -1, *rows_M.shape[1:])
    return row_TKF.sum(axis=1, dtype=jnp.float32).astype(rows_M.dtype)


def _to_slots(
    rows_N: jax.Array, plan: Dispatch, axis_name: Axis | None, transport: Transport
) -> jax.Array:
    """Rows in sending order -> rows by slot."""
    if axis_name is None or plan.segments is None:
        received = rows_N
    else:
        num_rows = len(plan.to_group)
        received = exchange(rows_N, plan.segments, num_rows, axis_name, transport)
    return take_or_zero(received, plan.to_group)


def _from_slots(
    rows_M: jax.Array, plan: Dispatch, axis_name: Axis | None, transport: Transport
) -> jax.Array:
    """Rows by slot -> rows choice by choice."""
    received = take_or_zero(rows_M, plan.from_group)
    num_sent = len(plan.order)
    if axis_name is None or plan.segments is None:
        return take_or_zero(received, plan.inverse)
    back = plan.segments.reversed()
    returned = exchange(received, back, num_sent, axis_name, transport)
    return take_or_zero(returned, plan.inverse)


def _shifted(shift: jax.Array, sizes: jax.Array, num_rows: int) -> jax.Array:
    """Runs of `sizes` consecutive numbers, each moved by `shift`; then out of range."""
    row_M = jnp.arange(num_rows, dtype=jnp.int32)
    shift_M = jnp.repeat(
        shift.reshape(-1), sizes.reshape(-1), total_repeat_length=num_rows
    )
    return jnp.where(row_M < sizes.sum(), row_M + shift_M, jnp.iinfo(jnp.int32).max)


def _check_plan(
    num_slots: int,
    num_devices: int,
    axis_name: Axis | None,
    num_rows: int | None,
    num_sent: int | None,
) -> None:
    if num_devices < 1 or num_slots % num_devices:
        raise ValueError(
            f"{num_devices=} must divide {num_slots=}: every device has as many."
        )
    if axis_name is None and num_devices > 1:
        raise ValueError(
            f"{num_devices=} needs axis_name, the mesh axis that they are on."
        )
    for name, value in (("num_rows", num_rows), ("num_sent", num_sent)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1; None suffices.")
