"""Next-token prediction."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from instar.objectives.masked import wide


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


def _sums(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return {
        "nats": jnp.sum(weights * (log_z - chosen)),
        "log_z_squared": jnp.sum(weights * jnp.square(log_z)),
        "max_logit_squared": jnp.sum(weights * jnp.square(jnp.max(logits, axis=-1))),
        "weight": jnp.sum(weights),
    }


def next_token_sums(
    hidden: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = 0,
) -> dict[str, jax.Array]:
    """Sums over the targets of what a next-token loss is made of.

    The head runs on `chunk` positions of each row at a time (0: on all at once), and its logits
    are computed again in the backward pass, so that logits of [B, chunk, V] are all that exists.
    The positions of a chunk are spread over the row, so that each device takes its share of every
    chunk where rows are split.

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
    batch, length = targets.shape
    if chunk <= 0 or chunk >= length:
        return _sums(head(hidden), targets, weights)
    if length % chunk:
        raise ValueError(f"chunk {chunk} does not divide the {length} positions of a row")

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, chunk, length // chunk, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def one(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
        return _sums(head(hidden), targets, weights)

    def body(sums: dict, piece: tuple) -> tuple[dict, None]:
        return jax.tree.map(jnp.add, sums, one(*piece)), None

    pieces = (split(hidden), split(targets), split(weights))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(lambda p: one(*p), jax.tree.map(lambda x: x[0], pieces)),
    )
    return jax.lax.scan(body, zeros, pieces)[0]
