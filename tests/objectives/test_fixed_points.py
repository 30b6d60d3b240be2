"""The optimum of reward minus KL, pi*(y) = pi_ref(y) exp(r(y) / beta) / Z, where all is exact.

Every response is one token out of a few, so that expectations are sums over all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import assert_close

from instar.objectives.language import token_log_probs
from instar.objectives.policy import importance_weights, ppo_policy_loss
from instar.objectives.preference import dpo_loss
from instar.objectives.rewards import gae, shape_rewards

CHOICES, BETA = 6, 0.4
RNG = np.random.default_rng(0)
REWARDS = RNG.standard_normal(CHOICES)
REFERENCE = RNG.standard_normal(CHOICES)
ELSEWHERE = RNG.standard_normal(CHOICES)
OPTIMUM = REFERENCE + REWARDS / BETA  # logits: the softmax divides by Z


def log_policy(logits):
    """log pi of each response: [choices, 1]."""
    return token_log_probs(jnp.tile(logits, (CHOICES, 1, 1)), jnp.arange(CHOICES)[:, None])


def ppo_gradient(logits):
    """PPO's gradient, on policy; weights make the mean over all responses an expectation."""
    old, reference = log_policy(logits), log_policy(REFERENCE)
    mask = jnp.ones((CHOICES, 1), int)
    rewards = shape_rewards(REWARDS, old, reference, mask, BETA)
    advantages, _ = gae(rewards, jnp.zeros_like(rewards), mask, 1.0, 0.95)
    uniform = jnp.full_like(old, -np.log(CHOICES))
    weights = importance_weights(old, uniform, np.inf)

    def loss(logits):
        new = log_policy(logits)
        return ppo_policy_loss(new, old, advantages, mask, 0.2, weights=weights)[0]

    return jax.grad(loss)(logits)


def dpo_gradient(logits):
    """DPO's, over all ordered pairs, each as frequent as Bradley-Terry makes it."""
    winners, losers = np.nonzero(~np.eye(CHOICES, dtype=bool))
    frequencies = 1 / (1 + np.exp(REWARDS[losers] - REWARDS[winners]))

    def loss(logits):
        policy, reference = log_policy(logits), log_policy(REFERENCE)
        pairs = policy[winners], policy[losers], reference[winners], reference[losers]
        return frequencies @ jax.vmap(lambda *pair: dpo_loss(*pair, BETA)[0])(*pairs)

    return jax.grad(loss)(logits)


@pytest.mark.parametrize("gradient", [ppo_gradient, dpo_gradient])
def test_the_gradient_vanishes_at_the_optimum_alone(gradient):
    with jax.enable_x64(True):
        assert np.max(np.abs(gradient(OPTIMUM))) < 1e-12
        assert np.max(np.abs(gradient(ELSEWHERE))) > 1e-2


def test_on_policy_ppo_descends_the_penalised_reward():
    def negative_objective(logits):
        log_pi, log_ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
        return -jnp.exp(log_pi) @ (REWARDS - BETA * (log_pi - log_ref))

    with jax.enable_x64(True):
        assert_close(ppo_gradient(ELSEWHERE), jax.grad(negative_objective)(ELSEWHERE))
