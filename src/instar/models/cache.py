"""The cache of what attention reads: a pytree that carries its own positions and segments."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from instar.errors import UserError
from instar.models.prefix import NOWHERE
from instar.models.spec import Layer, ModelSpec

LayerCache = tuple[jax.Array, ...]


class Keys(NamedTuple):
    """What a mixer keeps of tokens, keys and values or latents, and where the tokens are.

    Arrays [B, T, kv_heads, D]; int32 [B, T] each.
    """

    kept: tuple[jax.Array, ...]
    positions: jax.Array
    segment_ids: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What later tokens need of those read so far, a slot for each, right-padded by row.

    `layers[group][layer of the period]` is what the layer's mixer keeps, keys and values or
    latents: arrays [repeat, B, kv_heads, size, D], in the order in which the products of attention
    read them, so that a step copies nothing around. Their size is the capacity, or that of the
    layer's window where this is less: a ring of the last tokens, of which number n of a row, from 0
    on, lies at n mod size. `positions` and `segment_ids` are int32 [B, capacity], of all tokens;
    segment 0 marks an empty slot, so that the attention contract alone decides what is visible.
    `length` int32 [B] is the next free slot.
    `marks` int32 [B, ...] tell where a prefix ends (see `instar.models.prefix`), if there are any.
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    positions: jax.Array
    segment_ids: jax.Array
    length: jax.Array
    marks: jax.Array | None = None


def init_cache(
    spec: ModelSpec, batch: int, capacity: int, dtype: jnp.dtype, parts: int = 1
) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens.

    `parts` is how many devices share the heads of a row, each of which has one at least.

    Raises:
      UserError: the model has no learned position for the last of them.
    """
    if spec.learned_positions and capacity > spec.max_positions:
        raise UserError(
            f"{capacity} tokens, prompt and new ones together, exceed the {spec.max_positions} "
            "learned positions of the model: shorten one of them"
        )

    def empty(repeat: int, layer: Layer) -> LayerCache:
        mixer = layer.mixer
        # What a prefix shows to all of a text is no matter of distance.
        windowed = mixer.window is not None and spec.prefix is None
        slots = min(mixer.window, capacity) if windowed else capacity
        kept = mixer.cached(parts)
        return tuple(jnp.zeros((repeat, batch, n, slots, size), dtype) for n, size in kept)

    zeros = jnp.zeros((batch, capacity), jnp.int32)
    layers = tuple(tuple(empty(n, layer) for layer in period) for n, period in spec.layers)
    marks = None
    if spec.prefix is not None:
        marks = jnp.full((batch, 1 + len(spec.prefix.mask_ids)), NOWHERE, jnp.int32)
    return KVCache(layers, zeros, zeros, jnp.zeros(batch, jnp.int32), marks)


def slots_for(cache: KVCache, segment_ids: jax.Array) -> jax.Array:
    """The slot of each new token, int32 [B, S]; padding (segment 0) gets one past the end."""
    real = segment_ids > 0
    slots = cache.length[:, None] + jnp.cumsum(real, axis=1) - 1
    return jnp.where(real, slots, cache.positions.shape[1]).astype(jnp.int32)


def write(buffer: jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
    """Puts values [B, S, ...] at `slots` [B, S] of a buffer [B, capacity, ...], or drops them."""
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slots].set(values.astype(buffer.dtype), mode="drop")


def write_layer(
    cache: LayerCache, index: jax.Array, slots: jax.Array, kept: tuple[jax.Array, ...]
) -> LayerCache:
    """Puts arrays [B, S, kv_heads, D] at `slots` [B, S] of the repetition `index`, or drops them.

    Under a loop over layers that carries the cache, this is an update in place.
    """
    rows = jnp.arange(slots.shape[0])[:, None]
    if slots.size == 1:
        # A second token, which is dropped: of one alone XLA's CPU backend makes another operation,
        # merges that with what reads the cache, and then has to copy the cache.
        slots = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=cache[0].shape[3])
        kept = tuple(jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in kept)

    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        return buffer.at[index, rows, :, slots].set(values.astype(buffer.dtype), mode="drop")

    return tuple(map(put, cache, kept))


def read_layer(cache: LayerCache, index: jax.Array) -> LayerCache:
    """What is kept of the repetition `index`: arrays [B, size, kv_heads, D]."""

    def take(buffer: jax.Array) -> jax.Array:
        layer = jax.lax.dynamic_index_in_dim(buffer, index, axis=0, keepdims=False)
        return layer.swapaxes(1, 2)

    return tuple(map(take, cache))


def extend_layer(
    cache: KVCache, layer: LayerCache, index: jax.Array, slots: jax.Array, new: Keys
) -> tuple[Keys, LayerCache]:
    """What `new` tokens may see, themselves included, and the layer with them in it.

    Args:
      cache: of all layers, whose places are those after the new tokens (see `advance`).
      layer: of all repetitions, of which this is number `index`.
      slots: int32 [B, S], see `slots_for`.
    """
    size, capacity = layer[0].shape[3], cache.positions.shape[1]
    if size == capacity:
        written = write_layer(layer, index, slots, new.kept)
        return Keys(read_layer(written, index), cache.positions, cache.segment_ids), written
    after = cache.length[:, None]
    lasting = (slots < capacity) & (slots >= after - size)
    written = write_layer(layer, index, jnp.where(lasting, slots % size, size), new.kept)
    if slots.shape[1] == 1:
        return Keys(read_layer(written, index), *_places_in_ring(cache, size, after)), written
    # Of several tokens the first see some whose slots the last take: the ring is read before.
    before = after - (new.segment_ids > 0).sum(axis=1, keepdims=True, dtype=jnp.int32)
    old = Keys(read_layer(layer, index), *_places_in_ring(cache, size, before))
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=1), old, new)
    return both, written


def _places_in_ring(cache: KVCache, size: int, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions and segments, int32 [B, size], in a ring of rows of `length` [B, 1] tokens."""
    newest = length - 1
    number = newest - (newest - jnp.arange(size)) % size  # below 0 where none has come yet
    positions, segments = (
        jnp.take_along_axis(x, jnp.maximum(number, 0), axis=1)
        for x in (cache.positions, cache.segment_ids)
    )
    return positions, jnp.where(number >= 0, segments, 0)


def advance(cache: KVCache, slots: jax.Array, positions: jax.Array, segments: jax.Array) -> KVCache:
    """The cache after new tokens took their slots; what mixers keep is written layer by layer."""
    return dataclasses.replace(
        cache,
        positions=write(cache.positions, slots, positions),
        segment_ids=write(cache.segment_ids, slots, segments),
        length=cache.length + (segments > 0).sum(axis=1, dtype=jnp.int32),
    )
