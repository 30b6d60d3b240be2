"""A seeded permutation of any range, evaluated at a point, without a table or a shuffle buffer.

A Feistel network permutes the integers of an even number of bits (Luby & Rackoff 1988); walking its
cycle until the value falls inside the range makes that a permutation of any range (Black & Rogaway
2002, section 3). Unlike an affine map it leaves no visible order between neighbours.
"""

import hashlib

import numpy as np

ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014, figure 16), on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_keys(*parts: int | str) -> np.ndarray:
    """A uint64 key for each round, by hashing what names the permutation."""
    digest = hashlib.sha512("\0".join(map(str, parts)).encode()).digest()
    return np.frombuffer(digest, "<u8")[:ROUNDS].astype(np.uint64)


def permute(index: np.ndarray, size: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of range(size) sends each index.

    Args:
      index: integers [N] in [0, size).
      size: at least 1; one for all, or one for each index.
      keys: uint64 [ROUNDS] from `derive_keys`, or [N, ROUNDS] for a permutation of its own for
        each index.

    Returns:
      int64 [N]. For fixed size and keys this is a bijection of range(size).
    """
    index = np.asarray(index, np.uint64)
    size = np.broadcast_to(np.asarray(size, np.uint64), index.shape)
    keys = np.broadcast_to(np.atleast_2d(keys), (len(index), ROUNDS))
    bits = np.maximum(np.ceil(np.log2(np.maximum(size.astype(np.float64), 2)) / 2), 1)
    half = bits.astype(np.uint64)
    half += (np.uint64(1) << (half + half)) < size  # where the logarithm was rounded down
    result = _feistel(index, half, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], half[outside], keys[outside])
        outside = outside[result[outside] >= size[outside]]
    return result.astype(np.int64)


def _feistel(x: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    with np.errstate(over="ignore"):
        for i in range(ROUNDS):
            left, right = right, left ^ (_mix(right ^ keys[:, i]) & mask)
    return (left << half) | right
