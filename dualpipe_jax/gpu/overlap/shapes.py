"""Parses shapes as HLO writes them: `bf16[128,64]{1,0}`, and tuples of these."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of one array: element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits per element; 0 where nothing is stored (token, opaque)."""
        if self.dtype == "pred":
            return 8
        match = _BITS.match(self.dtype)
        return int(match[1]) if match else 0

    @property
    def num_bytes(self) -> int:
        return -(-self.size * self.bits // 8)


@functools.lru_cache(maxsize=65536)
def leaves(shape: str) -> tuple[Array, ...]:
    """Returns the arrays of a shape; of a nested tuple, from left to right.

    Examples:
      >>> leaves("(bf16[2,3]{1,0}, (s32[], pred[4]{0}))")[0]
      Array(dtype='bf16', dims=(2, 3))
    """
    return tuple(
        Array(dtype, tuple(int(d.lstrip("<= ")) for d in dims.split(",") if d.strip()))
        for dtype, dims in _ARRAY.findall(_COMMENT.sub("", shape))
    )


def num_bytes(shape: str) -> int:
    """Returns the bytes of all arrays of a shape."""
    return sum(array.num_bytes for array in leaves(shape))
