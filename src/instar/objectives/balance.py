"""What keeps a router from giving all tokens to the same experts."""

import jax
import jax.numpy as jnp

from instar.objectives.masked import wide


def balance_loss(load: jax.Array, probability: jax.Array) -> jax.Array:
    """experts * sum of f * P over the experts of each layer (Fedus et al. 2021, eq. 4 to 6).

    f is the share of all choices that fell on an expert (so that it is theirs where one is chosen)
    and P the router's mean probability for it. It is 1 where both are even, and `experts` where one
    expert takes everything.

    Args:
      load: [..., experts], how many tokens chose each expert; no gradient goes through it.
      probability: [..., experts], the sum of their probabilities over all tokens.

    Returns:
      [...], 0 where there are no tokens.
    """
    load, probability = wide(jax.lax.stop_gradient(load), probability)
    shares, means = _shares(load), _shares(probability)
    return load.shape[-1] * jnp.sum(shares * means, axis=-1)


def load_extremes(load: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest and the smallest load of any expert of any layer, as multiples of the mean.

    Args:
      load: [..., experts].
    """
    relative = load.shape[-1] * _shares(load)
    return relative.max(), relative.min()


def _shares(x: jax.Array) -> jax.Array:
    total = x.sum(-1, keepdims=True)
    return x / jnp.where(total > 0, total, 1)
