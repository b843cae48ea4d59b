"""Checks that a checkpoint's arrays are finite, and those that were written.

Orbax's files carry checksums of their index but none of the arrays' bytes: a bit that
flipped on a disk is restored silently. So a checkpoint's info has the checksum of each
array, computed on the devices that hold it.
"""

from __future__ import annotations

import json
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec


class DamagedError(Exception):
    """What was read is not what was written."""


def names_of(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, such as `params/stages/0/kernel`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every leaf, by name, as JSON holds them."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for name, leaf in names_of(tree).items()
    }


class Examined(NamedTuple):
    """What an array is found to be.

    Attributes:
      checksum: a sum of the elements' bits modulo 2^32, each times an odd hash of its
        position: the order of summation does not matter, and any change of one element
        changes it.
      is_finite: whether all elements are; integers are.
    """

    checksum: int
    is_finite: bool


def examine(tree: Any) -> dict[str, Examined]:
    """Examines every array; the results do not depend on how arrays are laid out.

    All processes that hold a part of the arrays call this, and get the same.

    Args:
      tree: arrays of integers, floats or booleans, of any sharding.

    Examples:
      >>> x = np.arange(6, dtype=np.float32)
      >>> examine({"x": x}) == examine({"x": x})
      True
      >>> examine({"x": x}) == examine({"x": x[::-1]})
      False
      >>> examine({"x": 1 / (1 + x), "y": x - np.inf})["y"].is_finite
      False
    """
    leaves = names_of(tree)
    if not leaves:
        return {}
    arrays = [jnp.asarray(leaf) for leaf in leaves.values()]
    if all(d.platform == "cpu" for array in arrays for d in array.devices()):
        found = _on_host(arrays)  # compiling would take longer than summing
    else:
        found = _on_devices(arrays)
    return {
        name: Examined(int(checksum), not number)
        for name, checksum, number in zip(leaves, *found, strict=True)
    }


def nonfinite(examined: dict[str, Examined]) -> str:
    """Names the arrays that are not finite; empty if all are.

    Examples:
      >>> nonfinite({n: Examined(0, n == "w") for n in "uvwxyz"})
      'u, v, x and 2 others'
    """
    return few([name for name, each in examined.items() if not each.is_finite])


def few(names: list[str]) -> str:
    """The first of some names, and how many others there are."""
    others = f" and {len(names) - 3} others" if len(names) > 4 else ""
    return ", ".join(names[:3] if others else names) + others


def _on_devices(arrays: list[jax.Array]) -> np.ndarray:
    """Checksums, and numbers of elements that are not finite: [2, arrays] uint32."""
    meshes = [a.sharding.mesh for a in arrays if isinstance(a.sharding, NamedSharding)]
    # Whole on every process, so that each can read it.
    out = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    return np.asarray(jax.jit(_examine, out_shardings=out)(arrays))


def _on_host(arrays: list[jax.Array]) -> np.ndarray:
    """The same, with numbers of blocks that are not finite."""
    found = np.zeros((2, len(arrays)), np.uint32)
    for i, array in enumerate(arrays):
        blocks = []
        for shard in array.addressable_shards:
            if shard.replica_id == 0:  # each element once, over all processes
                block = np.asarray(shard.data)
                starts = [part.start or 0 for part in shard.index]
                checksum = _block_checksum(block, starts, array.shape)
                blocks.append((checksum, not np.all(_is_finite(block))))
        found[:, i] = np.sum(blocks, axis=0, dtype=np.uint32)
    if jax.process_count() > 1:
        found = np.asarray(multihost_utils.process_allgather(found))
        found = found.sum(axis=0, dtype=np.uint32)
    return found


def _block_checksum(
    block: np.ndarray, starts: list[int], shape: tuple[int, ...]
) -> np.uint32:
    """The sum of `_checksum` over one block of an array."""
    bits = np.ascontiguousarray(block).reshape(-1)
    bits = bits.view(f"u{min(4, block.dtype.itemsize)}").reshape(*block.shape, -1)
    place, stride = np.zeros((), np.uint32), 1
    sizes = [*zip(starts, block.shape, shape, strict=True)]
    if bits.shape[-1] > 1:  # wider than 32 bits
        sizes += [(0, bits.shape[-1], bits.shape[-1])]
    else:
        bits = bits.reshape(block.shape)
    for axis, (start, size, whole) in reversed(list(enumerate(sizes))):
        along = np.arange(start, start + size).astype(np.uint32)
        along *= np.uint32(stride % 2**32)
        place = place + along.reshape([-1] + [1] * (len(sizes) - 1 - axis))
        stride *= whole
    place = np.array(np.broadcast_to(place, bits.shape), np.uint32, ndmin=1)
    place = (place ^ (place >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    place = (place ^ (place >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    weight = (place ^ (place >> np.uint32(16))) | np.uint32(1)
    return (np.atleast_1d(bits).astype(np.uint32) * weight).sum(dtype=np.uint32)


def seal(body: dict[str, Any]) -> dict[str, Any]:
    """The JSON object `body`, with a checksum of its text."""
    body = json.loads(json.dumps(body))  # as it will be read: keys are strings
    return body | {"crc32": _crc32(body)}


def unseal(sealed: Any) -> dict[str, Any]:
    """The object that `seal` was given.

    Raises:
      DamagedError: this is not what `seal` returned.
    """
    if not isinstance(sealed, dict):
        raise DamagedError("its info is not a JSON object")
    body = {key: value for key, value in sealed.items() if key != "crc32"}
    if sealed.get("crc32") != _crc32(body):
        raise DamagedError("its info does not have the checksum written beside it")
    return body


def _crc32(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _examine(leaves: list[jax.Array]) -> jax.Array:
    numbers = [jnp.sum(~_is_finite(leaf), dtype=jnp.uint32) for leaf in leaves]
    return jnp.stack([jnp.stack([*map(_checksum, leaves)]), jnp.stack(numbers)])


def _is_finite(x: Any) -> Any:
    """Which elements are finite, of a numpy or jax array."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return np.ones(x.shape, bool)
    # Not every library knows what is finite in eight bits.
    x = x.astype(np.float32) if x.dtype.itemsize == 1 else x
    return jnp.isfinite(x) if isinstance(x, jax.Array) else np.isfinite(x)


def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}")
    # Places by axis: flattening a sharded array would gather it.
    place = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        iota = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place += iota * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # MurmurHash3's 32-bit finalizer.
    place = (place ^ (place >> 16)) * jnp.uint32(0x85EBCA6B)
    place = (place ^ (place >> 13)) * jnp.uint32(0xC2B2AE35)
    weight = (place ^ (place >> 16)) | jnp.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)
