"""Attention tile by tile: what some queries see of some keys, and what both get of gradients.

A row is cut into tiles, laid along a leading axis. Queries are then
[tiles, B, kv_heads, group, n, D], where `group` are the heads that share keys; keys
[tiles, B, kv_heads, m, D] and values [tiles, B, kv_heads, m, V]; and places [tiles, B, n]. The
functions of one tile take these without the leading axis. Sums are in float32 (in float64 for
float64 inputs).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from instar.models.attention import MASKED, alibi, visible

# Logits of so many queries and keys exist at a time. Large enough for matrix units, and small
# enough that the memory of a row does not grow with the square of its length.
TILE = 512


@dataclass(frozen=True)
class Form:
    """The arguments of the contract that are known before anything is computed."""

    window: int | None
    scale: float
    softcap: float | None
    bias_rounded: bool = False


class Places(NamedTuple):
    """Where tokens are in their texts: int `positions` and `segment_ids`, of one shape."""

    positions: jax.Array
    segment_ids: jax.Array


class Beside(NamedTuple):
    """What belongs to no token: `prefix_length` [B] or None, ALiBi's slopes [heads] or None."""

    prefix_length: jax.Array | None
    slopes: jax.Array | None


class Running(NamedTuple):
    """A softmax under way: the sum of values, the highest logit and the sum of weights so far.

    A weight is exp(logit - highest).
    """

    total: jax.Array
    highest: jax.Array
    weight: jax.Array


# --- One tile -----------------------------------------------------------------------------------


def sees(form: Form, at: Places, kv_at: Places, beside: Beside) -> jax.Array:
    """Whether any of these queries may see any of these keys: never False where one does.

    Compares the first and the last text of each, and the outermost positions in those. It is exact
    where positions rise along a row, as they do in packed ones.
    """
    low, first, high, last = _extent(at)
    kv_low, kv_first, kv_high, kv_last = _extent(kv_at)
    later = (kv_low == high) & (kv_first > last)
    if beside.prefix_length is not None:
        later &= kv_first >= beside.prefix_length
    apart = (kv_low > high) | (kv_high < low) | later
    if form.window is not None and beside.prefix_length is None:
        apart |= (kv_high == low) & (first - kv_last >= form.window)
    return ~jnp.all(apart)


def _extent(at: Places) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of each row the first text and its first position, the last and its last: int [B] each."""
    positions, segments = at
    low = jnp.where(segments > 0, segments, jnp.iinfo(segments.dtype).max).min(-1)
    high = segments.max(-1)
    first = jnp.where(segments == low[:, None], positions, jnp.iinfo(positions.dtype).max).min(-1)
    last = jnp.where(segments == high[:, None], positions, -1).max(-1)
    return low, first, high, last


def _logits(
    form: Form, q: jax.Array, k: jax.Array, at: Places, kv_at: Places, beside: Beside
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The logits of a tile [B, kv_heads, group, n, m], which are visible, and the cap's slope."""
    logits = _product("bhgqd,bhkd->bhgqk", q, k) * form.scale
    slope = None
    if form.softcap is not None:
        bent = jnp.tanh(logits / form.softcap)
        logits, slope = form.softcap * bent, 1 - bent * bent
    if beside.slopes is not None:
        slopes = beside.slopes.astype(logits.dtype).reshape(q.shape[1:3])
        scale = form.scale if form.bias_rounded else None
        logits += alibi(slopes, at.positions, kv_at.positions, scale)
    places = (at.positions, kv_at.positions, at.segment_ids, kv_at.segment_ids)
    mask = visible(*places, form.window, beside.prefix_length)
    return logits, mask[:, None, None], slope


def add_tile(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: Places,
    kv_at: Places,
    beside: Beside,
    state: Running,
) -> Running:
    """The softmax with the keys of one more tile (Milakov and Gimelshein 2018, algorithm 3)."""
    logits, mask, _ = _logits(form, q, k, at, kv_at, beside)
    highest = jnp.maximum(state.highest, jnp.where(mask, logits, MASKED).max(-1))
    shrink = jnp.exp(state.highest - highest)
    weights = jnp.where(mask, jnp.exp(logits - highest[..., None]), 0)
    return Running(
        state.total * shrink[..., None] + _product("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v),
        highest,
        state.weight * shrink + weights.sum(-1),
    )


def add_gradients(
    form: Form,
    queries: tuple,
    k: jax.Array,
    v: jax.Array,
    kv_at: Places,
    beside: Beside,
    to_q: jax.Array,
    to_keys: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Gradients of queries, and of keys and values, with what one tile adds to them.

    Dao et al. (2022), appendix B.2, algorithm 4.

    Args:
      queries: q; the gradient of the result; the logarithms of the softmax's denominators, and the
        sums of gradient times result, both [B, kv_heads, group, n, 1]; and the queries' places.
    """
    q, g, log_z, change, at = queries
    logits, mask, slope = _logits(form, q, k, at, kv_at, beside)
    weights = jnp.where(mask, jnp.exp(logits - log_z), 0)
    to_logits = weights * (_product("bhgqd,bhkd->bhgqk", g, v) - change)
    if slope is not None:
        to_logits *= slope
    to_logits = (to_logits * form.scale).astype(q.dtype)
    to_k = to_keys[0] + _product("bhgqk,bhgqd->bhkd", to_logits, q)
    to_v = to_keys[1] + _product("bhgqk,bhgqd->bhkd", weights.astype(g.dtype), g)
    return to_q + _product("bhgqk,bhkd->bhgqd", to_logits, k), (to_k, to_v)


def _product(terms: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(terms, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


# --- All tiles ----------------------------------------------------------------------------------


def start(queries: jax.Array, value_dim: int) -> Running:
    """Before any key was seen, of those that have values of that size."""
    accumulate = jnp.promote_types(queries.dtype, jnp.float32)
    empty = jnp.zeros(queries.shape[:-1], accumulate)
    total = jnp.zeros((*empty.shape, value_dim), accumulate)
    return Running(total, empty + MASKED, empty)


def finish(state: Running) -> tuple[jax.Array, jax.Array]:
    """The means [..., n, V], and the logarithms of the softmax's denominators [..., n, 1].

    A query that saw nothing, which is padding, gets zeros.
    """
    weight = jnp.where(state.weight > 0, state.weight, 1)[..., None]
    return state.total / weight, state.highest[..., None] + jnp.log(weight)


def _size(length: int) -> int:
    """The tokens of a tile: a half of the row, whose halves may be from two places, or less.

    Halves go on being halved while they are even and longer than `TILE`.
    """
    if length % 2:
        return length
    size = length // 2
    while size > TILE and size % 2 == 0:
        size //= 2
    return size


def cut_queries(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, S, heads, D] -> [tiles, B, kv_heads, group, n, D]."""
    batch, length, heads, depth = x.shape
    x = x.reshape(batch, -1, _size(length), kv_heads, heads // kv_heads, depth)
    return x.transpose(1, 0, 3, 4, 2, 5)


def join_queries(x: jax.Array) -> jax.Array:
    """The inverse of `cut_queries`."""
    tiles, batch, kv_heads, group, size, depth = x.shape
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, tiles * size, kv_heads * group, depth)


def cut_keys(x: jax.Array) -> jax.Array:
    """[B, T, kv_heads, D] -> [tiles, B, kv_heads, m, D]."""
    return cut_queries(x, x.shape[2])[:, :, :, 0]


def join_keys(x: jax.Array) -> jax.Array:
    """The inverse of `cut_keys`."""
    return join_queries(x[:, :, :, None])


def cut_places(at: Places) -> Places:
    """int [B, S] -> [tiles, B, n]."""

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1, _size(x.shape[1])).swapaxes(0, 1)

    return Places(*map(cut, at))
