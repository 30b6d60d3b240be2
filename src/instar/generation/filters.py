"""Which tokens may be drawn, and the draw: without a sort of the vocabulary.

Scores are float32 [B, V], and each row has a filter of its own. Nothing is sorted: thresholds are
found among a few candidates, or by bisection where these do not suffice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# So many of the best tokens nearly always hold the threshold, and are found in one cheap pass.
CANDIDATES = 256
# Sums over the vocabulary run over blocks of this size and over the tokens of one of them.
BLOCK = 256


def rank(scores: jax.Array) -> jax.Array:
    """An int32 for each float32 that orders as the floats do, with -0 below 0."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def bisect(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The least integer of low..high for which `holds`, which is monotone: int32 [B].

    It is `high` where it holds nowhere below. At most 32 evaluations, and none if low = high.
    """

    def unfinished(bounds: tuple) -> jax.Array:
        return (bounds[0] < bounds[1]).any()

    def halve(bounds: tuple) -> tuple:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        found = holds(middle)
        return jnp.where(found | (low == high), low, middle + 1), jnp.where(found, middle, high)

    return jax.lax.while_loop(unfinished, halve, (low, high))[0]


def smallest_set(scores: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The fewest tokens, best scores first, whose weights sum to `target`: bool [B, V].

    Of equal scores the lowest ids come first. All tokens where their weights do not reach it.

    Args:
      scores: float32 [B, V]. weights: float32 [B, V], not negative. target: float32 [B].
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # -0 and 0 tie
    ranks, ids = rank(scores), jnp.arange(scores.shape[1])

    def reached(kept: jax.Array) -> jax.Array:
        return jnp.where(kept, weights, 0).sum(-1) >= target

    # The threshold is negated, since `bisect` looks for a least integer: ~x = -x - 1.
    best, best_ids = jax.lax.top_k(scores, min(CANDIDATES, scores.shape[1]))
    sums = jnp.cumsum(jnp.take_along_axis(weights, best_ids, axis=1), axis=1)
    enough = sums >= target[:, None]
    first = jnp.take_along_axis(best, enough.argmax(-1)[:, None], axis=1)[:, 0]
    among, reachable = enough.any(-1), weights.sum(-1) >= target
    high = jnp.where(among, ~rank(first), ~ranks.min(-1))
    low = jnp.where(among | ~reachable, high, ~rank(best[:, -1]))
    threshold = ~bisect(lambda t: reached(ranks >= ~t[:, None]), low, high)[:, None]

    above, tied = ranks > threshold, ranks == threshold
    last = jnp.full_like(low, scores.shape[1] - 1)
    start = jnp.where(reachable & (tied.sum(-1) > 1), 0, last)
    end = bisect(lambda i: reached(above | (tied & (ids <= i[:, None]))), start, last)
    return above | (tied & (ids <= end[:, None])) | ~reachable[:, None]


def top_k(scores: jax.Array, k: jax.Array) -> jax.Array:
    """The k best tokens, exactly k of them; all where k int32 [B] is 0: bool [B, V]."""
    target = jnp.where(k > 0, k.astype(jnp.float32), jnp.inf)
    return smallest_set(scores, jnp.ones_like(scores), target)


def top_p(scores: jax.Array, p: jax.Array) -> jax.Array:
    """The fewest tokens whose probabilities sum to p float32 [B] (Holtzman et al. 2020, eq. 2)."""
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    target = jnp.where(p < 1, p * weights.sum(-1), jnp.inf)
    return smallest_set(scores, weights, target)


def min_p(scores: jax.Array, p: jax.Array) -> jax.Array:
    """The tokens at least p float32 [B] times as probable as the best (Nguyen et al. 2024, 3.1)."""
    return jnp.exp(scores - scores.max(-1, keepdims=True)) >= p[:, None]


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of the tokens `seen` bool [B, V] moved down (Keskar et al. 2019, section 4.1).

    Positive ones are divided by `penalty` float32 [B], and negative ones multiplied, since dividing
    those would make them more probable.
    """
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def draw(scores: jax.Array, uniform: jax.Array) -> jax.Array:
    """One token of each row from softmax(scores), by a number `uniform` of [0, 1): int32 [B].

    The inverse of the distribution function, in two levels: first the block, then the token. (The
    Gumbel trick needs a random number for each token of the vocabulary, 4 to 20 times the time.)
    A token of probability 0 is never drawn.
    """
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -scores.shape[1] % BLOCK)))
    weights = weights.reshape(len(weights), -1, BLOCK)
    sums = weights.sum(-1)
    block, rest = locate(sums, uniform * sums.sum(-1))
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    token, _ = locate(inside, rest)
    return (block * BLOCK + token).astype(jnp.int32)


def locate(weights: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first place where the running sum of weights [B, N] exceeds goal [B].

    Always at a positive weight, though the running sums are rounded.

    Returns:
      The index int [B], and the goal less the weights before it, at least 0.
    """
    running = jnp.cumsum(weights, axis=-1)
    ends = jnp.where(weights > 0, running, 0)
    goal = jnp.minimum(goal, jnp.nextafter(ends.max(-1), jnp.float32(0)))
    index = (ends > goal[:, None]).argmax(-1)
    before = jnp.take_along_axis(running - weights, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(goal - before, 0)
