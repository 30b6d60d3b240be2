"""The cache of keys and values: a pytree that carries its own positions and segments."""

import dataclasses

import jax
import jax.numpy as jnp

from instar.errors import UserError
from instar.models.prefix import NOWHERE
from instar.models.spec import Layer, ModelSpec

LayerCache = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of what was read so far, a slot for each token, right-padded by row.

    `layers[group][layer of the period]` is (k, v), each [repeat, B, kv_heads, capacity, D]: in the
    order in which the products of attention read them, so that a step copies nothing around.
    `positions` and `segment_ids` are int32 [B, capacity]; segment 0 marks an empty slot, so that
    the attention contract alone decides what is visible. `length` int32 [B] is the next free slot.
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
        shape = (repeat, batch, max(mixer.kv_heads, parts), capacity, mixer.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

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
    cache: LayerCache, index: jax.Array, slots: jax.Array, k: jax.Array, v: jax.Array
) -> LayerCache:
    """Puts k and v [B, S, kv_heads, D] at `slots` [B, S] of the repetition `index`, or drops them.

    Under a loop over layers that carries the cache, this is an update in place.
    """
    rows = jnp.arange(slots.shape[0])[:, None]
    if slots.size == 1:
        # A second token, which is dropped: of one alone XLA's CPU backend makes another operation,
        # merges that with what reads the cache, and then has to copy the cache.
        slots = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=cache[0].shape[3])
        k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))

    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        return buffer.at[index, rows, :, slots].set(values.astype(buffer.dtype), mode="drop")

    return put(cache[0], k), put(cache[1], v)


def read_layer(cache: LayerCache, index: jax.Array) -> LayerCache:
    """The keys and values of the repetition `index`, each [B, capacity, kv_heads, D]."""

    def take(buffer: jax.Array) -> jax.Array:
        layer = jax.lax.dynamic_index_in_dim(buffer, index, axis=0, keepdims=False)
        return layer.swapaxes(1, 2)

    return take(cache[0]), take(cache[1])


def advance(cache: KVCache, slots: jax.Array, positions: jax.Array, segments: jax.Array) -> KVCache:
    """The cache after new tokens took their slots; keys and values are written layer by layer."""
    return dataclasses.replace(
        cache,
        positions=write(cache.positions, slots, positions),
        segment_ids=write(cache.segment_ids, slots, segments),
        length=cache.length + (segments > 0).sum(axis=1, dtype=jnp.int32),
    )
