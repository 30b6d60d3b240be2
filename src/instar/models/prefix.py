"""The two positions of tokens in texts that begin with a prefix (GLM, Du et al. 2022)."""

import jax
import jax.numpy as jnp

from instar.models.spec import Prefix

# An index that no token has: there is no such token, or none yet.
NOWHERE = 2**30

# Of a text, the index of its start token and that of each of the mask tokens: int32 [..., 1 + N].
Marks = jax.Array


def marks_of_tokens(tokens: jax.Array, index: jax.Array, prefix: Prefix) -> Marks:
    """Of each token [B, S] its own index where it is one of the special ones: [B, S, 1 + N]."""
    special = jnp.asarray((prefix.start_id, *prefix.mask_ids))
    return jnp.where(tokens[..., None] == special, index[..., None], NOWHERE)


def marks_of_texts(marks: Marks, segment_ids: jax.Array) -> Marks:
    """Of each token [B, S, 1 + N] the first of each kind in its own text."""
    length = marks.shape[1]

    def of_row(marks: jax.Array, segments: jax.Array) -> jax.Array:
        first = jax.ops.segment_min(marks, segments, num_segments=length + 1)
        return first[segments]

    return jax.vmap(of_row)(marks, segment_ids)


def places_and_blocks(index: jax.Array, marks: Marks) -> tuple[jax.Array, jax.Array]:
    """The place and the block of tokens at `index` [B, S] of texts with `marks` [B, S, 1 + N].

    Of the mask tokens the first kind that occurs before the start says the place.
    """
    start, masks = marks[..., 0], marks[..., 1:]
    place = jnp.zeros_like(index)
    for kind in reversed(range(masks.shape[-1])):
        found = masks[..., kind]
        place = jnp.where(found < NOWHERE, found, place)
    behind = index >= start
    return jnp.where(behind, place, index), jnp.where(behind, index - start + 1, 0)
