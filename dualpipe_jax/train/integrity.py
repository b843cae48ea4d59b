"""Checks that the arrays read from a checkpoint are those that were written.

Orbax's files carry checksums of their index but none of the arrays' bytes: a bit that
flipped on a disk is restored silently. So a checkpoint's info has the checksum of each
array, computed on the devices that hold it.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

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


def checksums(tree: Any) -> dict[str, int]:
    """A checksum of every array, the same however the array is laid out.

    It is a sum of the elements' bits modulo 2^32, each times an odd hash of its
    position: the order of summation does not matter, and any change of one element
    changes it.

    Args:
      tree: arrays of integers, floats or booleans, of any sharding.

    Examples:
      >>> x = np.arange(6, dtype=np.float32)
      >>> checksums({"x": x}) == checksums({"x": x})
      True
      >>> checksums({"x": x}) == checksums({"x": x[::-1]})
      False
    """
    leaves = names_of(tree)
    if not leaves:
        return {}
    arrays = [jnp.asarray(leaf) for leaf in leaves.values()]
    if all(d.platform == "cpu" for array in arrays for d in array.devices()):
        sums = _on_host(arrays)  # compiling would take longer than summing
    else:
        sums = _on_devices(arrays)
    return dict(zip(leaves, sums, strict=True))


def _on_devices(arrays: list[jax.Array]) -> list[int]:
    meshes = [a.sharding.mesh for a in arrays if isinstance(a.sharding, NamedSharding)]
    # Whole on every process, so that each can read it.
    out = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    return np.asarray(jax.jit(_checksums, out_shardings=out)(arrays)).tolist()


def _on_host(arrays: list[jax.Array]) -> list[int]:
    sums = np.zeros((1, len(arrays)), np.uint32)
    for i, array in enumerate(arrays):
        blocks = [
            _block_checksum(
                np.asarray(shard.data),
                [part.start or 0 for part in shard.index],
                array.shape,
            )
            for shard in array.addressable_shards
            if shard.replica_id == 0  # each element once, over all processes
        ]
        sums[0, i] = np.sum(blocks, dtype=np.uint32)
    if jax.process_count() > 1:
        sums = np.asarray(multihost_utils.process_allgather(sums[0]))
    return sums.sum(axis=0, dtype=np.uint32).tolist()


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


def _checksums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


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
