"""From the score of a response to the advantage of each of its tokens."""

import jax
import jax.numpy as jnp

from instar.errors import UserError
from instar.objectives.masked import keep, wide

# By what share of the target an iteration may seem to miss it (Ziegler et al. 2019, section 2.2).
ADAPTIVE_LIMIT = 0.2


def kl(log_probs: jax.Array, ref_log_probs: jax.Array, estimator: str = "k1") -> jax.Array:
    """Estimates KL(pi || pi_ref) at each token of a sample from pi.

    With d = log pi - log pi_ref, after Schulman ("Approximating KL divergence", 2020): k1 = d is
    unbiased, k2 = d^2 / 2 is biased with a low variance, k3 = exp(-d) - 1 + d is unbiased and
    never negative.

    Args:
      log_probs, ref_log_probs: [B, T], of the sampled tokens.
      estimator: "k1", "k2" or "k3".

    Returns:
      [B, T] in at least float32.

    Raises:
      UserError: there is no such estimator.
    """
    log_probs, ref_log_probs = wide(log_probs, ref_log_probs)
    d = log_probs - ref_log_probs
    match estimator:
        case "k1":
            return d
        case "k2":
            return jnp.square(d) / 2
        case "k3":
            return jnp.expm1(-d) + d
    raise UserError(f"no KL estimator {estimator!r}: use k1, k2 or k3")


def adaptive_beta(
    beta: jax.Array, kl: jax.Array, batch: int, target: float, horizon: float
) -> jax.Array:
    """The KL coefficient of the next update (Ziegler et al. 2019, section 2.2).

    The error kl / target - 1 is clipped to +-0.2; the paper's K_beta is `batch / horizon`. What
    comes out is positive where `horizon` is more than 0.2 * `batch`.

    Args:
      beta: a scalar. kl: a scalar, the mean over responses of the KL in nats summed over each.
      batch: the number of responses that `kl` is from. target: nats. horizon: in responses.
    """
    error = jnp.clip(kl / target - 1, -ADAPTIVE_LIMIT, ADAPTIVE_LIMIT)
    return beta * (1 + error * batch / horizon)


def decayed_beta(
    iteration: jax.Array | int, first: float, final: float, iterations: int
) -> jax.Array:
    """The KL coefficient of an iteration (from 0) that falls linearly and then stays.

    Iteration 0 has `first`, and iteration `iterations` - 1 and those behind it have `final`.
    """
    done = jnp.minimum(iteration / (iterations - 1), 1.0)
    return first + done * (final - first)


def shape_rewards(
    scores: jax.Array,
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    mask: jax.Array,
    beta: float | jax.Array,
) -> jax.Array:
    """-beta (log pi - log pi_ref) at each token, plus the score at a response's last token.

    Summed over a response it is the reward of Ziegler et al. (2019, equation 2).

    Args:
      scores: [B]; of no effect where a row has no token under the mask.
      log_probs, ref_log_probs: [B, T]. mask: [B, T], 1 on response tokens.

    Returns:
      [B, T] in at least float32 (whatever the mask's dtype); 0 outside the mask.
    """
    log_probs, ref_log_probs = keep(mask, log_probs, ref_log_probs)
    (scores,) = wide(scores)
    real = jnp.asarray(mask, bool)
    remaining = jax.lax.cumsum(real.astype(int), axis=1, reverse=True)
    last = real & (remaining == 1)
    return -beta * (log_probs - ref_log_probs) + jnp.where(last, scores[:, None], 0)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    gamma: float | jax.Array,
    lam: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the
    next position under the mask, and rewards and values are 0 past the last one.

    Args:
      rewards, values: [B, T]; values[:, t] is of the state before token t.
      mask: [B, T], 1 on response tokens.

    Returns:
      advantages: [B, T] in at least float32; 0 outside the mask.
      returns: [B, T], advantages + values; 0 outside the mask.
    """
    rewards, values = keep(mask, rewards, values)

    def step(
        following: tuple[jax.Array, jax.Array], here: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        next_advantage, next_value = following
        reward, value, real = here
        delta = reward + gamma * next_value - value
        advantage = jnp.where(real, delta + gamma * lam * next_advantage, next_advantage)
        return (advantage, jnp.where(real, value, next_value)), advantage

    zeros = jnp.zeros_like(rewards[:, 0])
    by_time = (rewards.T, values.T, jnp.asarray(mask, bool).T)
    _, advantages = jax.lax.scan(step, (zeros, zeros), by_time, reverse=True)
    (advantages,) = keep(mask, advantages.T)
    return advantages, advantages + values
