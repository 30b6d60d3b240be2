"""Losses that learn from which of several responses people preferred."""

import jax
import jax.numpy as jnp

from instar.objectives import masked


def ranking_loss(
    scores: jax.Array,
    ranks: jax.Array,
    mask: jax.Array,
    margin: float | jax.Array = 0.0,
    centring: float = 0.0,
    doubt: float | jax.Array = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log sigmoid(s_w - s_l - margin) over all pairs of a prompt's responses.

    It is the reward model's loss of Ouyang et al. (2022, equation 1), with the margin of Touvron
    et al. (2023, equation 2): the mean over each prompt's untied pairs, then over the prompts that
    have one. Scores are free up to a constant for each prompt; `centring` times the squared sum of
    a pair's scores pulls them towards 0 (Eisenstein et al. 2023, equation 2). A pair that is the
    wrong way round with probability `doubt` costs what it costs on average (Mitchell 2023, "A note
    on DPO with noisy preferences", equation 3): the best difference of its scores is then finite.

    Args:
      scores: [B, K], of K responses to each of B prompts.
      ranks: [B, K]; the lower is the better, and of equal ones no pair is made.
      mask: [B, K], 1 on responses that exist.
      margin: a number, or an array that broadcasts to [B, K, K], first the better response's place.
      doubt: likewise, from 0 to 1/2.

    Returns:
      A scalar and its statistics: `accuracy`, of all pairs in the batch those whose better response
      has the higher score; `pairs`, their number; `prompts`, the number that have one.
    """
    (scores,) = masked.keep(mask, scores)
    ranks, real = jnp.asarray(ranks), jnp.asarray(mask, bool)
    better = ranks[:, :, None] < ranks[:, None, :]
    pairs = better & real[:, :, None] & real[:, None, :]
    gaps = scores[:, :, None] - scores[:, None, :]
    sums = scores[:, :, None] + scores[:, None, :]
    as_told, reversed_ = jax.nn.softplus(margin - gaps), jax.nn.softplus(margin + gaps)
    losses = (1 - doubt) * as_told + doubt * reversed_ + centring * jnp.square(sums)
    decided = jnp.any(pairs, axis=(1, 2))
    stats = {
        "accuracy": masked.fraction(gaps > 0, pairs),
        "pairs": jnp.sum(pairs),
        "prompts": jnp.sum(decided),
    }
    return masked.mean(masked.mean(losses, pairs, axis=(1, 2)), decided), stats


def dpo_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    beta: float | jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    Args:
      chosen, rejected: [B], log-probabilities of whole responses under the policy.
      ref_chosen, ref_rejected: [B], under the reference.
      beta: the KL coefficient of the problem that the optimum solves.

    Returns:
      A scalar and its statistics: `chosen_reward` and `rejected_reward`, the means of
      beta log(pi / pi_ref); `margin`, their difference; `accuracy`, how often it is positive.
    """
    chosen, rejected, ref_chosen, ref_rejected = masked.wide(
        chosen, rejected, ref_chosen, ref_rejected
    )
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    stats = {
        "accuracy": jnp.mean(margin > 0, dtype=margin.dtype),
        "margin": jnp.mean(margin),
        "chosen_reward": jnp.mean(chosen_reward),
        "rejected_reward": jnp.mean(rejected_reward),
    }
    return jnp.mean(jax.nn.softplus(-margin)), stats
