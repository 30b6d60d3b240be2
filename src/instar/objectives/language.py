"""Next-token prediction."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from instar.objectives.masked import wide

Tree = TypeVar("Tree")


def token_log_probs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log p(tokens) under softmax(logits): [..., V], int [...] -> [...] in at least float32."""
    (logits,) = wide(logits)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: jax.Array) -> jax.Array:
    """The entropy of softmax(logits) in nats: [..., V] -> [...] in at least float32.

    A logit of -inf is a token that cannot occur, and adds nothing.
    """
    log_probs = jax.nn.log_softmax(*wide(logits), axis=-1)
    finite = jnp.where(jnp.isneginf(log_probs), 0, log_probs)
    return -jnp.sum(jnp.exp(log_probs) * finite, axis=-1)


def by_chunks(
    function: Callable[..., Tree], chunk: int, hidden: jax.Array, *others: jax.Array
) -> Tree:
    """function(hidden, *others), computed on `chunk` positions of each row at a time.

    What the function makes in between, such as logits, exists for one chunk only, and is computed
    again in the backward pass. The positions of a chunk are spread over the row, so that each
    device takes its share of every chunk where rows are split.

    Args:
      function: treats every position by itself: arrays [B, S, ...] -> a tree of arrays [B, S, ...].
      chunk: 0, or at least S: all positions at once.
      hidden, others: [B, S, ...].

    Raises:
      ValueError: `chunk` does not divide S.
    """
    batch, length = hidden.shape[:2]
    if chunk <= 0 or chunk >= length:
        return function(hidden, *others)
    if length % chunk:
        raise ValueError(f"chunk {chunk} does not divide the {length} positions of a row")

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, chunk, length // chunk, *x.shape[2:]), 2, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2).reshape(batch, length, *x.shape[3:])

    one = jax.checkpoint(function)
    found = jax.lax.map(lambda piece: one(*piece), tuple(map(split, (hidden, *others))))
    return jax.tree.map(join, found)


def next_token_sums(
    hidden: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = 0,
) -> dict[str, jax.Array]:
    """Sums over the targets of what a next-token loss is made of.

    The head runs on `chunk` positions of each row at a time, see `by_chunks`, so that logits of
    [B, chunk, V] are all that exists.

    Args:
      hidden: [B, S, embed]. head: [..., embed] -> logits [..., V].
      targets: int [B, S]. weights: [B, S], 0 where there is nothing to predict.

    Returns:
      Scalars: `nats`, the sum of -log p(target); `log_z_squared`, the sum of squared log
      normalisers (for the z-loss of PaLM, section 5); `max_logit_squared`, the sum of squared
      largest logits (for the max-z loss of Baichuan 2, 2309.10305, section 2.4); and `weight`, the
      sum of the weights.

    Raises:
      ValueError: `chunk` does not divide S.
    """

    def of_each(hidden: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        logits = head(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return {
            "nats": log_z - chosen,
            "log_z_squared": jnp.square(log_z),
            "max_logit_squared": jnp.square(jnp.max(logits, axis=-1)),
        }

    found = by_chunks(of_each, chunk, hidden, targets)
    sums = {name: jnp.sum(weights * value) for name, value in found.items()}
    return sums | {"weight": jnp.sum(weights)}
