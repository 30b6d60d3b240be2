"""Sums, means and whitening over what a mask marks.

A mask is 1 (or True) on what counts. The rest is selected away rather than multiplied by zero, so
that not even a NaN there reaches a value or a gradient. Over an empty mask sums and means are 0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def wide(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays in one common dtype, at least float32, since bfloat16 loses digits in sums."""
    dtype = jnp.result_type(jnp.float32, *arrays)
    return [jnp.asarray(x, dtype) for x in arrays]


def keep(mask: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The arrays as `wide` gives them, with 0 outside the mask; all of one shape."""
    return [jnp.where(mask, x, 0) for x in wide(*arrays)]


def total(x: jax.Array, mask: jax.Array, axis: int | Sequence[int] | None = None) -> jax.Array:
    """The sum of x under a mask of its shape; over axis -1, log-probabilities of sequences."""
    (x,) = keep(mask, x)
    return jnp.sum(x, axis)


def mean(x: jax.Array, mask: jax.Array, axis: int | Sequence[int] | None = None) -> jax.Array:
    """The mean of x under a mask of its shape."""
    count = jnp.sum(jnp.asarray(mask, bool), axis)
    return total(x, mask, axis) / jnp.maximum(count, 1)


def fraction(marks: jax.Array, mask: jax.Array) -> jax.Array:
    """How much of a mask is marked: both of one shape -> a scalar, counted in integers."""
    mask = jnp.asarray(mask, bool)
    return jnp.sum(marks & mask) / jnp.maximum(jnp.sum(mask), 1)


def variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The biased variance of x under a mask of its shape: a scalar."""
    (x,) = keep(mask, x)
    return mean(jnp.square(x - mean(x, mask)), mask)


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
    """x with unit variance under the mask and, if `shift_mean`, mean 0; 0 outside the mask.

    The variance is biased, and 1e-8 is added to it.

    Args:
      x: [B, T]. mask: [B, T].

    Returns:
      [B, T] in at least float32.
    """
    (x,) = keep(mask, x)
    centre = mean(x, mask)
    scaled = (x - centre) * jax.lax.rsqrt(variance(x, mask) + 1e-8)
    return jnp.where(mask, scaled if shift_mean else scaled + centre, 0)
