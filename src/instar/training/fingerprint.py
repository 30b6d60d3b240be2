"""A digest of arrays that does not depend on how they are sharded."""

import hashlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

# Odd multipliers of two independent sums (from the hash of Steele & Vigna's SplitMix, truncated).
MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)

PART_BYTES = 2**26


def _bits(array: jax.Array) -> jax.Array:
    """The array's bits as uint32, with one more axis of 1 or 2 words."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint32)
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, words).astype(jnp.uint32)
    return bits if bits.ndim > array.ndim else bits[..., None]


def _leaf_sums(array: jax.Array, start: jax.typing.ArrayLike = 0) -> jax.Array:
    """uint32 [2]: sums modulo 2**32 of each word mixed with its place in the array.

    Addition modulo 2**32 is associative, so every sharding gives the same sums, bit for bit; and so
    do parts along the first dimension, each with the index `start` at which it begins.
    """
    bits = _bits(array)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += jnp.uint32(start) if axis == 0 else jnp.uint32(0)
        place = place * jnp.uint32(size) + index

    def mixed(multiplier: int) -> jax.Array:
        x = (bits ^ (place * jnp.uint32(multiplier))) * jnp.uint32(0xC2B2AE3D)
        x = (x ^ (x >> 15)) * jnp.uint32(multiplier)
        return jnp.sum(x ^ (x >> 13), dtype=jnp.uint32)

    return jnp.stack([mixed(multiplier) for multiplier in MULTIPLIERS])


_part_sums = jax.jit(_leaf_sums)


@jax.jit
def _tree_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_leaf_sums(leaf) for leaf in leaves]


def leaf_print(path: str, leaf: np.ndarray) -> bytes:
    """What one array adds to a fingerprint; `path` is `jax.tree_util.keystr` of its path.

    Goes through the array in parts of about `PART_BYTES`, for the sake of memory.
    """
    if not leaf.ndim:
        return _line(path, leaf, _tree_sums([leaf])[0])
    rows = max(1, PART_BYTES * len(leaf) // max(leaf.nbytes, 1))
    total = np.zeros(len(MULTIPLIERS), np.uint32)
    for start in range(0, len(leaf), rows):
        # A copy, since JAX holds on to the array that it was given, though not for long.
        part = leaf[start : start + rows].copy()
        total += np.asarray(_part_sums(part, np.uint32(start)))
    return _line(path, leaf, total)


def _line(path: str, leaf: jax.Array | np.ndarray, sums: jax.typing.ArrayLike) -> bytes:
    return f"{path} {leaf.dtype} {leaf.shape} ".encode() + np.asarray(sums).astype("<u4").tobytes()


def combine(prints: Iterable[bytes]) -> str:
    """The fingerprint of a tree whose arrays have these `leaf_print`s, in any order."""
    return hashlib.sha256(b"".join(sorted(prints))).hexdigest()


def fingerprint(tree: object) -> str:
    """64 hexadecimal digits that change when any bit, shape, type or path of a tree changes.

    Detects damage and names a state; it is not secure against an adversary.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sums = _tree_sums(list(leaves))
    keys = map(jax.tree_util.keystr, paths)
    return combine(_line(*each) for each in zip(keys, leaves, sums, strict=True))
