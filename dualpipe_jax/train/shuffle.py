"""A shuffle that needs no table: element i of a permutation, from a key and i alone.

A balanced Feistel network is a permutation of the numbers of an even number of bits,
whatever its round function; numbers that fall outside the range are sent through it
again until they are inside (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002, the generalized-Feistel and cycle-walking constructions). It
takes no memory, where a permutation of the windows of a large data set would take
gigabytes, and any element can be computed without those before it.
"""

from __future__ import annotations

import numpy as np

# Four rounds make a strong pseudorandom permutation of a good round function (Luby
# and Rackoff, 1988); the rest is for small ranges, where halves have few bits.
_ROUNDS = 8


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014): a good hash.

    Args:
      x: [...] uint64.

    Examples:
      >>> hex(mix(np.uint64(0)))  # the generator's first output for seed 0
      '0xe220a8397b1dcdaf'
    """
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permuted(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where each index goes under the permutation of `range(size)` of its key.

    Args:
      indices: [n] int64, each in `range(size)`.
      size: at least 1.
      keys: [n] uint64; each names a permutation.

    Returns:
      [n] int64, in `range(size)`.

    Examples:
      >>> sorted(permuted(np.arange(5), 5, np.full(5, 7, np.uint64)).tolist())
      [0, 1, 2, 3, 4]
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    values, keys = indices.astype(np.uint64), keys.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> bits, values[outside] & mask
        for turn in range(_ROUNDS):
            tweak = np.uint64(turn << 60)
            hashed = mix(mix(keys[outside] ^ tweak) ^ right)
            left, right = right, left ^ (hashed & mask)
        values[outside] = (left << bits) | right
        outside[outside] = values[outside] >= np.uint64(size)
    return values.astype(np.int64)
