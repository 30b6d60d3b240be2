"""The losses of proximal policy optimisation (PPO)."""

import jax
import jax.numpy as jnp

from instar.errors import UserError
from instar.objectives import masked
from instar.objectives.rewards import kl


def importance_weights(
    old_log_probs: jax.Array, rollout_log_probs: jax.Array, cap: float
) -> jax.Array:
    """min(pi_old / pi_rollout, cap) at each token: [B, T], without a gradient.

    They correct for a sampler whose numerics differ from the trainer's; the cap bounds their
    variance (truncated importance sampling, Ionides 2008).
    """
    old_log_probs, rollout_log_probs = masked.wide(old_log_probs, rollout_log_probs)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old_log_probs - rollout_log_probs), cap))


def ppo_policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip: float,
    *,
    dual_clip: float | None = None,
    log_ratio_limit: float | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate of Schulman et al. (2017, equation 7), to be minimised.

    With rho = pi / pi_old, the mean under the mask of
    max(-A rho, -A clip(rho, 1 - clip, 1 + clip)).

    Args:
      log_probs, old_log_probs, advantages: [B, T]. mask: [B, T], 1 on response tokens.
      dual_clip: where A < 0 the loss is at most -A dual_clip (Ye et al. 2020, equation 5).
      log_ratio_limit: log rho is clipped to +- this first, so that rho cannot overflow.
      weights: [B, T], each token's factor in the loss, as from `importance_weights`.

    Returns:
      A scalar and its statistics, means under the mask: `clip_fraction`, of the tokens whose loss
      is the clipped one; `approx_kl_k1` and `approx_kl_k3`, estimates of KL(pi_old || pi) before
      any limit; `ratio`, of rho.

    Raises:
      UserError: dual_clip is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise UserError(f"dual_clip bounds ratios above 1 and cannot be {dual_clip}")
    log_probs, old_log_probs, advantages = masked.keep(mask, log_probs, old_log_probs, advantages)
    log_ratio = log_probs - old_log_probs
    if log_ratio_limit is not None:
        log_ratio = jnp.clip(log_ratio, -log_ratio_limit, log_ratio_limit)
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    losses = jnp.maximum(unclipped, clipped)
    if dual_clip is not None:
        bounded = jnp.minimum(losses, -advantages * dual_clip)
        losses = jnp.where(advantages < 0, bounded, losses)
    if weights is not None:
        losses = losses * weights
    stats = {
        "clip_fraction": masked.fraction(clipped > unclipped, mask),
        "approx_kl_k1": masked.mean(kl(old_log_probs, log_probs, "k1"), mask),
        "approx_kl_k3": masked.mean(kl(old_log_probs, log_probs, "k3"), mask),
        "ratio": masked.mean(ratio, mask),
    }
    return masked.mean(losses, mask), stats


def ppo_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Half the squared error of values that may move by `clip` (infinity: freely) from the old.

    The mean under the mask of max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2) / 2, as in
    PPO's first implementation (Engstrom et al. 2020, section 3).

    Args:
      values, old_values, returns: [B, T]. mask: [B, T], 1 on response tokens.

    Returns:
      A scalar and its statistics under the mask: `clip_fraction`, of the tokens whose loss is the
      clipped one; `explained_variance`, 1 - Var[R - V] / Var[R], or 0 where the returns are equal.
    """
    values, old_values, returns = masked.keep(mask, values, old_values, returns)
    # Not old + clip(difference): its rounding would count values within the bounds as clipped.
    near = jnp.clip(values, old_values - clip, old_values + clip)
    unclipped, clipped = jnp.square(values - returns), jnp.square(near - returns)
    spread = masked.variance(returns, mask)
    unexplained = masked.variance(returns - values, mask) / jnp.where(spread > 0, spread, 1)
    stats = {
        "clip_fraction": masked.fraction(clipped > unclipped, mask),
        "explained_variance": jnp.where(spread > 0, 1 - unexplained, 0),
    }
    return masked.mean(jnp.maximum(unclipped, clipped), mask) / 2, stats
