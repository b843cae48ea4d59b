"""Weights of experts that a device fetches for one microbatch, and their gradients.

A fetch is one exchange per matrix. Each extra slot is one update of it, read from where
the expert is held and written into the slot, so that nothing is copied in between. On
the way home several devices may send a gradient of the same expert; there a buffer is
needed, and what does not fit into it comes in later rounds.

Shape suffixes: see `eplb_jax`; here Y entries of another row. X are the extra slots of
a device, Y those of the buffer for gradients.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from eplb_jax.layer.axes import all_gather, axis_index, ragged_all_to_all
from eplb_jax.layer.exchange import Transport, by_transport, exchange
from eplb_jax.layer.physical import WeightGatherPlan, plan_weight_gather
from eplb_jax.placement import take_or_zero
from eplb_jax.products import vary_alike
from eplb_jax.runtime import on_cpu


class Fetch(NamedTuple):
    """Where the weights of extra slots come from.

    Attributes:
      source: [devices, extra slots of a device] int32, the physical expert that each
        takes its weights from; -1 for none.
      gather: the same as a gather of rows, whose reverse brings gradients home.
    """

    source: jax.Array
    gather: WeightGatherPlan


def plan_fetch(source: jax.Array, per_device: int, axis_name: str) -> Fetch:
    """Plans a fetch; call in `jax.shard_map`.

    Args:
      source: see `Fetch`; the same on all devices. No device names its own.
      per_device: physical experts of a device.
      axis_name: mesh axis of the devices.

    Returns:
      A `Fetch`.
    """
    num_devices, num_fetched = source.shape
    source_S = source.reshape(-1)
    gather = plan_weight_gather(
        jnp.where(source_S < 0, num_devices, source_S // per_device),
        source_S % per_device,
        num_devices,
        # In the worst case all others fetch from this device.
        (num_devices - 1) * num_fetched,
        axis_name,
    )
    return Fetch(source, gather)


def add_fetched(
    weight: jax.Array,
    fetch: Fetch,
    *,
    dtype: Any,
    axis_name: str,
    transport: Transport,
) -> jax.Array:
    """Fetches the weights of the extra slots; differentiable.

    The gradient of a fetched expert is sent to the device that the expert came from,
    and added there in float32.

    Args:
      weight: [physical experts of this device, ...].
      fetch: from `plan_fetch`.
      dtype: of the arithmetic, in which weights are sent.
      axis_name: mesh axis of the devices.
      transport: see `exchange`.

    Returns:
      [slots of this device, ...], of that dtype; zeros for a slot that fetches none.
    """
    return _add_fetched(weight, fetch, jnp.dtype(dtype), axis_name, transport)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _add_fetched(
    weight: jax.Array, fetch: Fetch, dtype: Any, axis_name: str, transport: Transport
) -> jax.Array:
    weight = weight.astype(dtype)
    fetched = by_transport(
        transport,
        functools.partial(_by_ragged, axis_name=axis_name),
        functools.partial(_by_gather, axis_name=axis_name),
        weight,
        fetch.source,
    )
    return jnp.concatenate([weight, fetched])


def _forward(
    weight: jax.Array, fetch: Fetch, dtype: Any, axis_name: str, transport: Transport
) -> Any:
    slots = _add_fetched(weight, fetch, dtype, axis_name, transport)
    return slots, (fetch.gather, jnp.zeros(0, weight.dtype))


def _backward(
    dtype: Any, axis_name: str, transport: Transport, saved: Any, ct: jax.Array
) -> Any:
    del dtype
    gather, like = saved
    num_fetched = len(gather.received)
    own, fetched = ct[:-num_fetched].astype(jnp.float32), ct[-num_fetched:]
    # Slots in the order in which their rows arrived; those of none come last.
    fetched = fetched[jnp.argsort(gather.received)]
    way = {"axis_name": axis_name, "transport": transport}
    home = on_cpu(
        functools.partial(add_at_once, **way),
        functools.partial(add_in_rounds, **way),
        own,
        fetched,
        gather,
    )
    return home.astype(like.dtype), None


def add_at_once(
    own: jax.Array, fetched: jax.Array, gather: WeightGatherPlan, **way: Any
) -> jax.Array:
    """Adds what others have fetched, with room for the worst case.

    Args:
      own: [physical experts of this device, ...] float32.
      fetched: [extra slots, ...], in the order in which their rows arrived.
      gather: see `Fetch`.
      **way: `axis_name` and `transport`, see `exchange`.

    Returns:
      [physical experts of this device, ...] float32.
    """
    back = gather.segments.reversed()
    returned = exchange(fetched, back, len(gather.sent), **way).astype(jnp.float32)
    return own.at[gather.sent].add(returned, mode="drop")


def add_in_rounds(
    own: jax.Array, fetched: jax.Array, gather: WeightGatherPlan, **way: Any
) -> jax.Array:
    """The same, with room for as many as a device has slots.

    One round is nearly always enough, so it is not part of the loop: there it could not
    run beside other work.
    """
    room = len(own) + len(fetched)
    back = gather.segments.reversed()
    arriving_D = back.send_sizes.sum(axis=0, dtype=jnp.int32)
    sent = jnp.pad(gather.sent, (0, -len(gather.sent) % room), constant_values=len(own))
    expert_I1 = jnp.arange(len(own), dtype=jnp.int32)[:, None]

    def add_round(i: ArrayLike, own: jax.Array) -> jax.Array:
        start = jnp.asarray(i * room, jnp.int32)
        returned = exchange(fetched, back.window(start, room), room, **way)
        sent_Y = lax.dynamic_slice_in_dim(sent, start, room)
        # A sum in one order: a scatter on GPUs adds in any.
        is_of_IY = expert_I1 == sent_Y[None]
        is_of_IY = is_of_IY.reshape(*is_of_IY.shape, *[1] * (own.ndim - 1))
        added = jnp.where(is_of_IY, returned[None].astype(jnp.float32), 0)
        return own + added.sum(axis=1)

    num_rounds = -(-arriving_D.max() // room)
    own = add_round(0, own)
    # The name tells overlap reports not to count on it.
    with jax.named_scope("rarely"):
        return lax.fori_loop(1, num_rounds, add_round, own)


_add_fetched.defvjp(_forward, _backward)


def _by_ragged(weight: jax.Array, source_DX: jax.Array, *, axis_name: str) -> jax.Array:
    """Sends each slot of each device its row of `weight`: one update per slot."""
    me, num_held = axis_index(axis_name), len(weight)
    num_devices, num_fetched = source_DX.shape
    owner_DX = jnp.where(source_DX < 0, -1, source_DX // num_held)
    is_mine_DX = owner_DX == me
    slot_DX = jnp.arange(num_fetched, dtype=jnp.int32)[None] + jnp.zeros_like(source_DX)
    device_D1 = jnp.arange(num_devices, dtype=jnp.int32)[:, None]
    is_from_DX = owner_DX[me][None] == device_D1
    room = jnp.zeros((num_fetched, *weight.shape[1:]), weight.dtype)
    room, weight, source_DX = vary_alike(room, weight, source_DX)
    return ragged_all_to_all(
        weight,
        room,
        jnp.where(is_mine_DX, source_DX % num_held, 0).reshape(-1),
        is_mine_DX.astype(jnp.int32).reshape(-1),
        slot_DX.reshape(-1),
        is_from_DX.astype(jnp.int32).reshape(-1),
        axis=axis_name,
    )


def _by_gather(weight: jax.Array, source_DX: jax.Array, *, axis_name: str) -> jax.Array:
    """Gathers everything and picks; see `exchange`."""
    of_all = lax.collapse(all_gather(weight, axis_name), 0, 2)
    return take_or_zero(of_all, source_DX[axis_index(axis_name)])
