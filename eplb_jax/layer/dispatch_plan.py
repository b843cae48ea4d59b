"""The plan of a dispatch: integers that say where each row goes.

Every device computes the same plan from one gather of counts, [devices, physical
experts] integers; the ids of tokens are never exchanged.

Shape suffixes: see `eplb_jax`; here C choices of all tokens, C = T * K.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eplb_jax.layer.axes import Axis, all_gather, axis_index, psum
from eplb_jax.layer.exchange import Segments
from eplb_jax.layer.ids import known_ids
from eplb_jax.layer.routing import count_experts
from eplb_jax.products import is_typed


class DispatchPlan(NamedTuple):
    """Where the rows of this device's choices go, and which rows arrive here.

    Attributes:
      order: [rows sent] int32, the choices sorted by physical expert; choices of -1
        come last, and are left out if fewer rows are sent.
      inverse: [tokens * top_k] int32, the position of each choice in that order.
      segments: rows from device to device; None on one device.
      to_group: [rows] int32, the received row that each row of the buffer is.
      from_group: [rows] int32, the reverse. Both are out of range for empty rows.
      group_sizes: [physical experts of this device] int32, rows of the buffer for each.
      tokens_per_physical_expert: [physical experts] int32, choices of all devices.
      overflow: [] int32, choices of all devices that did not fit into a buffer.
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
    physical_experts: jax.Array,
    num_physical_experts: int,
    *,
    num_devices: int = 1,
    axis_name: Axis | None = None,
    num_rows: int | None = None,
    num_sent: int | None = None,
    is_distinct: bool = False,
    counts: jax.Array | None = None,
) -> DispatchPlan:
    """Plans where the row of every choice of every token goes.

    Args:
      physical_experts: [tokens, top_k], see `choose_physical_experts`; a choice outside
        [0, physical experts), such as -1, is not sent.
      num_physical_experts: on all devices.
      num_devices: devices that the physical experts are divided among, in order.
      axis_name: mesh axis of the devices, inside `jax.shard_map`, or groups of them;
        None on one device.
      num_rows: rows of a device's buffer; None: as many as can arrive. Empty rows cost
        memory and no arithmetic (`grouped_matmul`).
      num_sent: rows that a device sends; None: one per choice. Set it when most
        choices are -1.
      is_distinct: whether no token chooses a physical expert twice. Then at most
        min(top_k, physical experts of a device) rows of a token can arrive, else top_k.
      counts: [devices, physical experts] int32 choices; None: counted and gathered.

    Returns:
      A `DispatchPlan`.

    Raises:
      ValueError: if the devices do not divide the physical experts, if there are
        several devices but no axis, and if `num_rows` or `num_sent` is below 1.

    Examples:
      >>> plan = plan_dispatch(jnp.array([[2, 0], [0, -1]]), 3)
      >>> plan.order.tolist(), plan.group_sizes.tolist(), int(plan.overflow)
      ([1, 2, 0, 3], [2, 0, 1], 0)
    """
    _check(num_physical_experts, num_devices, axis_name, num_rows, num_sent)
    num_tokens, top_k = physical_experts.shape
    physical_experts = known_ids(physical_experts, num_physical_experts)
    physical_C = physical_experts.reshape(-1)
    key_C = jnp.where(physical_C < 0, num_physical_experts, physical_C)
    order_C = jnp.argsort(key_C, stable=True).astype(jnp.int32)
    position_C = jnp.arange(len(order_C), dtype=jnp.int32)
    inverse_C = jnp.zeros_like(position_C).at[order_C].set(position_C)
    if counts is None:
        counts = _count(physical_experts, num_physical_experts, axis_name)
    count_DDI = counts.reshape(num_devices, num_devices, -1)
    me = 0 if axis_name is None else axis_index(axis_name)
    if num_rows is None:
        most = min(top_k, count_DDI.shape[2]) if is_distinct else top_k
        num_rows = num_devices * num_tokens * most

    num_sent = len(order_C) if num_sent is None else min(num_sent, len(order_C))
    wanted_DD = count_DDI.sum(axis=2, dtype=jnp.int32)
    input_offsets_DD = jnp.cumsum(wanted_DD, axis=1) - wanted_DD
    sent_DD = jnp.clip(num_sent - input_offsets_DD, 0, wanted_DD)
    input_offsets_DD = jnp.minimum(input_offsets_DD, num_sent)
    before_DD = jnp.cumsum(sent_DD, axis=0) - sent_DD
    send_sizes_DD = jnp.clip(num_rows - before_DD, 0, sent_DD)
    output_offsets_DD = jnp.cumsum(send_sizes_DD, axis=0) - send_sizes_DD
    # Rows arrive sorted by device, then by expert; grouped, by expert, then by device.
    arrived_DI = count_DDI[:, me]
    skipped_DI = jnp.cumsum(arrived_DI, axis=1) - arrived_DI
    arrived_DI = jnp.clip(send_sizes_DD[:, me][:, None] - skipped_DI, 0, arrived_DI)
    received_DI = output_offsets_DD[:, me][:, None] + skipped_DI
    flat_ID = arrived_DI.T.reshape(-1)
    grouped_DI = (jnp.cumsum(flat_ID) - flat_ID).reshape(arrived_DI.T.shape).T

    # All devices' counts are here already.
    tokens_per_physical_expert = count_DDI.sum(axis=0, dtype=jnp.int32).reshape(-1)
    overflow = (wanted_DD - send_sizes_DD).sum(dtype=jnp.int32)
    if axis_name is not None and is_typed(counts):
        # Except where types must say that all devices have the same values.
        tokens_per_physical_expert = psum(counts[me], axis_name)
        overflow = psum((wanted_DD - send_sizes_DD)[me].sum(dtype=jnp.int32), axis_name)
    segments = Segments(send_sizes_DD, input_offsets_DD, output_offsets_DD)
    return DispatchPlan(
        order=order_C[:num_sent],
        inverse=inverse_C,
        segments=None if axis_name is None else segments,
        to_group=_shifted((received_DI - grouped_DI).T, arrived_DI.T, num_rows),
        from_group=_shifted(grouped_DI - received_DI, arrived_DI, num_rows),
        group_sizes=arrived_DI.sum(axis=0, dtype=jnp.int32),
        tokens_per_physical_expert=tokens_per_physical_expert,
        overflow=overflow,
    )


def _count(
    physical_experts: jax.Array, num_physical_experts: int, axis_name: Axis | None
) -> jax.Array:
    """[devices, physical experts] choices of each device."""
    count_S = count_experts(physical_experts, num_physical_experts)
    return count_S[None] if axis_name is None else all_gather(count_S, axis_name)


def _shifted(shift: jax.Array, sizes: jax.Array, num_rows: int) -> jax.Array:
    """Runs of `sizes` consecutive numbers, each moved by `shift`; then out of range."""
    row_M = jnp.arange(num_rows, dtype=jnp.int32)
    shift_M = jnp.repeat(
        shift.reshape(-1), sizes.reshape(-1), total_repeat_length=num_rows
    )
    return jnp.where(row_M < sizes.sum(), row_M + shift_M, jnp.iinfo(jnp.int32).max)


def _check(
    num_physical_experts: int,
    num_devices: int,
    axis_name: Axis | None,
    num_rows: int | None,
    num_sent: int | None,
) -> None:
    if num_devices < 1 or num_physical_experts % num_devices:
        raise ValueError(
            f"{num_devices=} must divide {num_physical_experts=}: every device has "
            "equally many."
        )
    if axis_name is None and num_devices > 1:
        raise ValueError(
            f"{num_devices=} needs axis_name, the mesh axis of the devices."
        )
    for name, value in (("num_rows", num_rows), ("num_sent", num_sent)):
        if value is not None and value < 1:
            raise ValueError(
                f"{name}={value} must be at least 1; None makes room for all rows."
            )
