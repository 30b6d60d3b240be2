"""Where sampled responses end, and what that does to their scores.

Real tokens are known by lengths alone: the padding may be the very token that ends a response.
"""

import math

import jax
import jax.numpy as jnp

from instar.errors import UserError
from instar.objectives.masked import wide


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """int [B] -> bool [B, size], True on the first `lengths` positions of each row."""
    return jnp.arange(size) < lengths[:, None]


def truncate(
    tokens: jax.Array, lengths: jax.Array, stop: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Ends each response after the first of its real tokens that is a stop token.

    Args:
      tokens: int [B, T]; whatever follows the first `lengths` of a row is never looked at.
      lengths: int [B]. stop: an id, or int [N], all of which end a response.

    Returns:
      lengths: int [B], with the stop token counted, as before where there is none.
      finished: bool [B], whether there is one.
    """
    stops = jnp.isin(tokens, stop) & length_mask(lengths, tokens.shape[1])
    finished = jnp.any(stops, axis=1)
    return jnp.where(finished, jnp.argmax(stops, axis=1) + 1, lengths), finished


def adjust_scores(
    scores: jax.Array,
    finished: jax.Array,
    *,
    limit: float = math.inf,
    penalty: float = 0.0,
    replacement: float | None = None,
) -> jax.Array:
    """The scores that reinforcement sees: clipped, then lowered where a response did not finish.

    Ziegler et al. (2019, section 3.1) use a fixed score for responses that break off.

    Args:
      scores: [B]. finished: bool [B].
      limit: scores are clipped to +-limit, before anything else.
      penalty: subtracted from the score of an unfinished response.
      replacement: the score of every unfinished response, instead of a penalty.

    Returns:
      [B] in at least float32.

    Raises:
      UserError: both a penalty and a replacement are given.
    """
    if penalty and replacement is not None:
        raise UserError("an unfinished response has a penalty or a replacement score: give one")
    (scores,) = wide(scores)
    scores = jnp.clip(scores, -limit, limit)
    unfinished = scores - penalty if replacement is None else replacement
    return jnp.where(finished, scores, unfinished)
