"""Whether arrays that are read back are those that were written.

Orbax's files carry checksums of their index but none of the arrays' bytes: one
that flipped on a disk is restored without a word. So a checkpoint's info names the
checksum of each array, taken on the devices that hold it.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
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
    place: no order of summation changes it, and any change of one element does.

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
    meshes = [
        leaf.sharding.mesh
        for leaf in leaves.values()
        if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    ]
    # Whole on every process, so that each can read it.
    out = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    sums = jax.jit(_checksums, out_shardings=out)(list(leaves.values()))
    return dict(zip(leaves, np.asarray(sums).tolist(), strict=True))


def seal(body: dict[str, Any]) -> dict[str, Any]:
    """The JSON object `body`, with a checksum of its text."""
    body = json.loads(json.dumps(body))  # as it will be read: keys are strings
    return body | {"crc32": _crc32(body)}


def unseal(sealed: Any) -> dict[str, Any]:
    """What `seal` was given.

    Raises:
      DamagedError: it was not `seal` that wrote this.
    """
    if not isinstance(sealed, dict):
        raise DamagedError("its info is no JSON object")
    body = {key: value for key, value in sealed.items() if key != "crc32"}
    if sealed.get("crc32") != _crc32(body):
        raise DamagedError("its info does not have the checksum written beside it")
    return body


def _crc32(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _checksums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(jnp.asarray(leaf)) for leaf in leaves])


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
