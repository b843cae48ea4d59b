"""A ragged all-to-all of rows, for use inside `jax.shard_map`.

On GPUs this is `jax.lax.ragged_all_to_all`, which moves only the rows that are sent.
XLA:CPU has no such collective; there every device gathers all rows and picks its own,
which is correct but slow, for tests and for development without GPUs.

The way back is the same function with the segments reversed, and so is the transpose.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eplb_jax.layer.axes import Axis, all_gather, axis_index, ragged_all_to_all
from eplb_jax.placement import check_choices, take_or_zero
from eplb_jax.products import vary_alike

Transport = Literal["auto", "ragged", "gather"]


class Segments(NamedTuple):
    """Which rows go where; the same values on all devices of the axis.

    Row i of each table is what device i passes to `jax.lax.ragged_all_to_all` under
    that name.

    Attributes:
      send_sizes: [devices, devices] int32, rows that device i sends to device j.
      input_offsets: [devices, devices] int32, the first of them among the rows of
        device i.
      output_offsets: [devices, devices] int32, the first of them among the rows that
        device j receives. Segments received from different devices do not overlap, and
        are in the order of these devices.
    """

    send_sizes: jax.Array
    input_offsets: jax.Array
    output_offsets: jax.Array

    def reversed(self) -> Segments:
        """Returns the segments of the way back."""
        return Segments(
            send_sizes=self.send_sizes.T,
            input_offsets=self.output_offsets.T,
            output_offsets=self.input_offsets.T,
        )

    def window(self, start: jax.Array, size: int) -> Segments:
        """Returns the rows that arrive in `[start, start + size)`, counted from there.

        Examples:
          Device 1 receives two rows of device 0 and three of its own; the window has
          the second and the third of these five:

          >>> table = lambda *rows: jnp.array(rows)
          >>> segments = Segments(send_sizes=table([0, 2], [0, 3]),
          ...                     input_offsets=table([0, 0], [0, 0]),
          ...                     output_offsets=table([0, 0], [0, 2]))
          >>> [part.tolist() for part in segments.window(1, 2)]
          [[[0, 1], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [0, 1]]]
        """
        first = self.output_offsets
        start_DD = jnp.maximum(first, start)
        end_DD = jnp.minimum(first + self.send_sizes, start + size)
        is_any_DD = start_DD < end_DD

        def of(value: jax.Array) -> jax.Array:
            return jnp.where(is_any_DD, value, 0)

        return Segments(
            send_sizes=of(end_DD - start_DD),
            input_offsets=of(self.input_offsets + start_DD - first),
            output_offsets=of(start_DD - start),
        )


def exchange(
    rows: jax.Array,
    segments: Segments,
    num_received: int,
    axis_name: Axis,
    transport: Transport = "auto",
) -> jax.Array:
    """Sends segments of rows to the devices of a mesh axis; call in `jax.shard_map`.

    Args:
      rows: [rows, ...], this device's.
      segments: which of them go where.
      num_received: rows of the result.
      axis_name: the mesh axis, or groups of its devices.
      transport: `"ragged"` is `lax.ragged_all_to_all`, `"gather"` works on every
        backend, `"auto"` is the former when lowered for CUDA and the latter elsewhere.

    Returns:
      [num_received, ...]; zero outside the segments.

    Raises:
      ValueError: for an unknown transport.

    Examples:
      Two devices of a CPU mesh; device 0 sends its two rows to device 1:

      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,))
      >>> table = lambda *rows: jnp.array(rows)
      >>> segments = Segments(send_sizes=table([0, 2], [0, 0]),
      ...                     input_offsets=table([0, 0], [0, 0]),
      ...                     output_offsets=table([0, 0], [0, 2]))
      >>> local = lambda rows: exchange(rows, segments, 3, "ep")
      >>> mapped = jax.shard_map(local, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
      >>> jax.jit(mapped)(jnp.array([1.0, 2.0, 3.0, 4.0])).tolist()
      [0.0, 0.0, 0.0, 1.0, 2.0, 0.0]
    """
    check_choices(transport=(transport, Transport))
    return _exchange(rows, segments, num_received, axis_name, transport)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _exchange(
    rows: jax.Array,
    segments: Segments,
    num_received: int,
    axis_name: Axis,
    transport: Transport,
) -> jax.Array:
    options = {"num_received": num_received, "axis_name": axis_name}
    return by_transport(
        transport,
        functools.partial(_by_ragged, **options),
        functools.partial(_by_gather, **options),
        rows,
        segments,
    )


def by_transport(
    transport: Transport,
    ragged: Callable[..., jax.Array],
    gather: Callable[..., jax.Array],
    *args: Any,
) -> jax.Array:
    """Calls what a transport stands for; see `exchange`."""
    if transport == "auto":
        return lax.platform_dependent(*args, cuda=ragged, default=gather)
    return {"ragged": ragged, "gather": gather}[transport](*args)


def _forward(
    rows: jax.Array,
    segments: Segments,
    num_received: int,
    axis_name: Axis,
    transport: Transport,
) -> Any:
    received = _exchange(rows, segments, num_received, axis_name, transport)
    return received, (segments, rows.shape[0])


def _backward(
    num_received: int, axis_name: Axis, transport: Transport, saved: Any, ct: jax.Array
) -> Any:
    segments, num_sent = saved
    back = segments.reversed()
    return _exchange(ct, back, num_sent, axis_name, transport), None


_exchange.defvjp(_forward, _backward)


def _by_ragged(
    rows: jax.Array, segments: Segments, *, num_received: int, axis_name: Axis
) -> jax.Array:
    me = axis_index(axis_name)
    room = jnp.zeros((num_received, *rows.shape[1:]), rows.dtype)
    room, rows, segments = vary_alike(room, rows, segments)
    return ragged_all_to_all(
        rows,
        room,
        segments.input_offsets[me],
        segments.send_sizes[me],
        segments.output_offsets[me],
        segments.send_sizes[:, me],
        axis=axis_name,
    )


def _by_gather(
    rows: jax.Array, segments: Segments, *, num_received: int, axis_name: Axis
) -> jax.Array:
    me = axis_index(axis_name)
    all_rows = all_gather(rows, axis_name)
    row_M = jnp.arange(num_received, dtype=jnp.int32)
    first_D = segments.output_offsets[:, me]
    end_D = first_D + segments.send_sizes[:, me]
    # From a row that is received to the same one among the rows of all devices.
    of_D = jnp.arange(len(all_rows), dtype=jnp.int32) * len(rows)
    shift_D = of_D + segments.input_offsets[:, me] - first_D
    is_from_MD = (first_D[None] <= row_M[:, None]) & (row_M[:, None] < end_D[None])
    shift_M = jnp.where(is_from_MD, shift_D[None], 0).sum(axis=1, dtype=jnp.int32)
    index_M = jnp.where(is_from_MD.any(axis=1), row_M + shift_M, -1)
    return take_or_zero(lax.collapse(all_rows, 0, 2), index_M)
