"""The attention contract, and its reference implementation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from instar.models.matmul import matmul

Attend = Callable[..., jax.Array]

# Finite, so that a query which sees nothing (padding) gives a finite, unused result.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def visible(
    positions: jax.Array,
    kv_positions: jax.Array,
    segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None = None,
    prefix_length: jax.Array | None = None,
) -> jax.Array:
    """Which keys each query may see: bool [B, S, T].

    A key is visible iff it is in the query's segment, and not after it, and (with a window w) less
    than w before it. Segment 0 is padding or an empty slot of a cache, and is visible to nobody.
    Keys at positions below `prefix_length` (int [B]) are visible to their whole segment.
    """
    distance = positions[:, :, None] - kv_positions[:, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if prefix_length is not None:
        allowed |= kv_positions[:, None, :] < prefix_length[:, None, None]
    same = segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    return allowed & same & (kv_segment_ids > 0)[:, None, :]


@jax.custom_vjp
def weighted_mean(logits: jax.Array, values: jax.Array) -> jax.Array:
    """softmax(logits) @ values: [..., N, T], [..., T, D] -> [..., N, D] in the values' dtype.

    Divides by the softmax's denominators after the product, D times a row and not T times. The
    gradient of a row of logits with weights p and result o is p * (dp - sum(do * o)) (Dao et al.
    2022, appendix B.2), where differentiating a softmax gives sum(dp * p): D terms and not T.
    """
    return _weigh(logits, values)[0]


def _weigh(logits: jax.Array, values: jax.Array) -> tuple[jax.Array, tuple]:
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    inverse = 1 / weights.sum(-1, keepdims=True)
    weights = weights.astype(values.dtype)
    mean = (matmul(weights, values, logits.dtype) * inverse).astype(values.dtype)
    mean = checkpoint_name(mean, "attention")
    return mean, (weights, inverse, values, mean)


def _weigh_backward(saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, inverse, values, mean = saved
    g = g * inverse
    change = (g * mean).sum(-1, keepdims=True)
    g = g.astype(values.dtype)
    # (g^T p)^T and not p^T g: of the two, the one that transposes small matrices.
    to_values = matmul(g.mT, weights).mT
    return weights * (matmul(g, values.mT, inverse.dtype) - change), to_values


weighted_mean.defvjp(_weigh, _weigh_backward)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    kv_positions: jax.Array,
    segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None = None,
    prefix_length: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias_slopes: jax.typing.ArrayLike | None = None,
    bias_rounded: bool | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) by positions and segments.

    Causality, packing, windows, prefixes, caches and ALiBi all follow from `positions` and
    `segment_ids`; see `visible`. The softmax is in float32 whatever the inputs are (in float64
    for float64 inputs).

    Args:
      q: [B, S, heads, D]. k: [B, T, kv_heads, D], v: [B, T, kv_heads, V]; `heads` is a multiple of
        `kv_heads`.
      positions, segment_ids: int [B, S] of the queries. kv_*: int [B, T] of the keys.
      scale: multiplies q.k; 1/sqrt(D) where None.
      softcap: c gives c * tanh(logits / c) (Gemma 2, 2408.00118, section 2).
      bias_slopes: ALiBi's slope of each head [heads] (Press et al. 2022, eq. in section 3).
      bias_rounded: whether its biases are those of Falcon RW (see `alibi`).

    Returns:
      [B, S, heads, V] in q's dtype.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    # Head by head, with the queries that share keys below one another: plain matrix products.
    rows = jnp.moveaxis(q.reshape(batch, length, kv_heads, group, head_dim), 1, 3)
    rows = rows.reshape(batch, kv_heads, group * length, head_dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    logits = matmul(rows, k.mT, accumulate).reshape(batch, kv_heads, group, length, k.shape[2])
    scale = head_dim**-0.5 if scale is None else scale
    logits *= scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias_slopes is not None:
        slopes = jnp.asarray(bias_slopes, accumulate).reshape(kv_heads, group)
        logits += alibi(slopes, positions, kv_positions, scale if bias_rounded else None)
    mask = visible(positions, kv_positions, segment_ids, kv_segment_ids, window, prefix_length)
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    mixed = weighted_mean(logits.reshape(*rows.shape[:-1], k.shape[2]), v)
    mixed = mixed.reshape(batch, kv_heads, group, length, v.shape[-1])
    return jnp.moveaxis(mixed, 3, 1).reshape(batch, length, heads, v.shape[-1])


def alibi(
    slopes: jax.Array,
    positions: jax.Array,
    kv_positions: jax.Array,
    rounded_scale: float | None = None,
) -> jax.Array:
    """What ALiBi adds to the logits: [B, kv_heads, group, S or 1, T], in the slopes' dtype.

    Press et al. (2022, section 3): slope * (key - query). Falcon RW's code leaves the query out,
    which a softmax does not notice, rounds the rest, slope * key, to bfloat16, which it does, and
    scales that as it scales q.k.

    Args:
      slopes: [kv_heads, group]. positions: int [B, S]. kv_positions: int [B, T].
      rounded_scale: the factor of q.k, for Falcon RW's form; None for the paper's.
    """
    slopes, keys = slopes[:, :, None, None], kv_positions[:, None, None, None, :]
    if rounded_scale is None:
        distance = keys - positions[:, None, None, :, None]
        return slopes * distance.astype(slopes.dtype)
    return rounded_scale * _bfloat16(_bfloat16(slopes) * _bfloat16(keys.astype(slopes.dtype)))


def _bfloat16(x: jax.Array) -> jax.Array:
    """x with the precision of bfloat16, which a compiler might leave out of two casts."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head, float64 [heads] (Press et al. 2022, section 3).

    For a number of heads that is no power of two: the slopes of the power p below, then every
    other slope of 2p.
    """
    power = 2 ** (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    rest = [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return np.asarray(first + rest)
