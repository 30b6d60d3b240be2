"""The ranking loss and DPO, against loops over pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import assert_close, assert_gradient

from instar.objectives.preference import dpo_loss, ranking_loss

BATCH = 7


def draw(seed: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, ranks with ties, and a mask; the last prompts have no pair, one pair, all tied."""
    rng = np.random.default_rng(seed)
    scores = 2 * rng.standard_normal((BATCH, k))
    ranks = rng.integers(1, k + 1, (BATCH, k))
    mask = (rng.random((BATCH, k)) < 0.8).astype(int)
    mask[-3] = np.arange(k) < 1
    mask[-2], ranks[-2] = np.arange(k) < 2, np.arange(k, 0, -1)
    mask[-1], ranks[-1] = 1, 3
    return scores, ranks, mask


def ranking_by_loops(scores, ranks, mask, margin=None, centring=0.0, doubt=None):
    batch, k = scores.shape
    margin = np.zeros((batch, k, k)) if margin is None else margin
    doubt = np.zeros((batch, k, k)) if doubt is None else doubt
    prompts, right, pairs = [], 0, 0
    for row in range(batch):
        terms = []
        for i in range(k):
            for j in range(k):
                if mask[row, i] and mask[row, j] and ranks[row, i] < ranks[row, j]:
                    gap, least = scores[row, i] - scores[row, j], margin[row, i, j]
                    term = (1 - doubt[row, i, j]) * np.log(1 + np.exp(least - gap))
                    term += doubt[row, i, j] * np.log(1 + np.exp(least + gap))
                    both = scores[row, i] + scores[row, j]
                    terms.append(term + centring * both**2)
                    right += scores[row, i] > scores[row, j]
        pairs += len(terms)
        if terms:
            prompts.append(sum(terms) / len(terms))
    stats = {"accuracy": right / pairs, "pairs": pairs, "prompts": len(prompts)}
    return sum(prompts) / len(prompts), stats


@pytest.mark.parametrize("k", range(2, 10))
def test_ranking_loss_equals_loops(k):
    scores, ranks, mask = draw(k, k)
    expected = ranking_by_loops(scores, ranks, mask)
    assert 0 < expected[1]["prompts"] < BATCH
    with jax.enable_x64(True):
        bad = np.where(mask, scores, np.nan)
        for marked in (mask, mask.astype(bool), mask.astype(float)):
            assert_close(jax.jit(ranking_loss)(bad, ranks, marked), expected)


def test_margin_and_centring_equal_loops():
    scores, ranks, mask = draw(20, 5)
    margin = np.random.default_rng(21).uniform(0, 1, (BATCH, 5, 5))
    with jax.enable_x64(True):
        found = ranking_loss(scores, ranks, mask, margin=margin, centring=0.01)
        assert_close(found, ranking_by_loops(scores, ranks, mask, margin, 0.01))
        found = ranking_loss(scores, ranks, mask, margin=0.7)
        assert_close(found, ranking_by_loops(scores, ranks, mask, np.full(margin.shape, 0.7)))


def test_doubt_equals_loops():
    scores, ranks, mask = draw(23, 6)
    rng = np.random.default_rng(24)
    margin, doubt = rng.uniform(0, 1, (BATCH, 6, 6)), rng.uniform(0, 0.5, (BATCH, 6, 6))
    with jax.enable_x64(True):
        found = ranking_loss(scores, ranks, mask, margin, 0.01, doubt)
        assert_close(found, ranking_by_loops(scores, ranks, mask, margin, 0.01, doubt))


def test_doubt_makes_the_best_difference_of_scores_finite():
    """Where a pair is believed with probability p, its scores are best log(p / (1 - p)) apart."""
    doubt = 0.2
    best = np.log((1 - doubt) / doubt)

    def loss(gap):
        scores = jnp.stack([gap, 0.0])[None]
        return ranking_loss(scores, np.array([[1, 2]]), np.ones((1, 2)), doubt=doubt)[0]

    with jax.enable_x64(True):
        assert jax.grad(loss)(best) == pytest.approx(0, abs=1e-12)
        assert jax.grad(loss)(best - 0.1) < 0 < jax.grad(loss)(best + 0.1)


def test_the_best_response_has_the_lowest_rank():
    loss, stats = ranking_loss(np.array([[9.0, 0.0]]), np.array([[1, 2]]), np.ones((1, 2)))
    assert loss < 1e-3
    assert stats["accuracy"] == 1
    loss, stats = ranking_loss(np.array([[9.0, 0.0]]), np.array([[2, 1]]), np.ones((1, 2)))
    assert loss == pytest.approx(9, abs=1e-3)
    assert stats["accuracy"] == 0


def test_equal_scores_order_nothing():
    loss, stats = ranking_loss(np.zeros((1, 3)), np.array([[1, 2, 3]]), np.ones((1, 3)))
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    assert stats["accuracy"] == 0


def test_prompts_weigh_the_same_whatever_their_number_of_pairs():
    scores = np.array([[0.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]])
    ranks, mask = np.array([[1, 2, 3, 4], [1, 2, 3, 4]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    loss, stats = ranking_loss(scores, ranks, mask)
    assert loss == pytest.approx((np.log(2) + np.log(1 + np.exp(5))) / 2, rel=1e-6)
    assert (stats["pairs"], stats["prompts"]) == (7, 2)


def test_gradient_of_the_ranking_loss():
    scores, ranks, mask = draw(22, 4)
    with jax.enable_x64(True):

        def loss(scores):
            return ranking_loss(scores, ranks, mask, margin=0.2, centring=0.05, doubt=0.1)[0]

        assert_gradient(loss, scores)
        bad = np.where(mask, scores, np.nan)
        assert_close(jax.grad(loss)(bad), jax.grad(loss)(scores))
        assert not np.any(np.asarray(jax.grad(loss)(bad))[mask == 0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_batch_without_pairs_gives_zeros(tied):
    scores = np.full((2, 3), 3.0 if tied else np.nan, np.float32)
    ranks, mask = np.full((2, 3), 1), np.full((2, 3), int(tied))
    (loss, stats), gradient = jax.value_and_grad(ranking_loss, has_aux=True)(scores, ranks, mask)
    assert loss == 0
    assert not np.any(gradient)
    assert all(stat == 0 for stat in stats.values())


def test_far_scores_do_not_overflow():
    scores, ranks, mask = np.float32([[-1e4, 1e4]]), np.array([[1, 2]]), np.ones((1, 2))
    (loss, _), gradient = jax.value_and_grad(ranking_loss, has_aux=True)(scores, ranks, mask)
    assert loss == 2e4
    assert gradient.tolist() == [[-1.0, 1.0]]


def test_dpo_loss_equals_loops():
    rng = np.random.default_rng(30)
    chosen, rejected, ref_chosen, ref_rejected = -rng.exponential(5, (4, BATCH))
    beta, terms, rewards = 0.3, [], []
    for i in range(BATCH):
        ratio = np.exp(chosen[i] - ref_chosen[i]) / np.exp(rejected[i] - ref_rejected[i])
        terms.append(-np.log(ratio**beta / (1 + ratio**beta)))
        rewards.append((beta * (chosen[i] - ref_chosen[i]), beta * (rejected[i] - ref_rejected[i])))
    stats = {
        "accuracy": np.mean([c > r for c, r in rewards]),
        "margin": np.mean([c - r for c, r in rewards]),
        "chosen_reward": np.mean([c for c, _ in rewards]),
        "rejected_reward": np.mean([r for _, r in rewards]),
    }
    assert 0 < stats["accuracy"] < 1
    with jax.enable_x64(True):
        found = jax.jit(dpo_loss)(chosen, rejected, ref_chosen, ref_rejected, beta)
        assert_close(found, (np.mean(terms), stats))
        for place, of in enumerate((chosen, rejected)):

            def loss(x, place=place):
                both = [chosen, rejected]
                both[place] = x
                return dpo_loss(*both, ref_chosen, ref_rejected, beta)[0]

            assert_gradient(loss, of)


def test_bfloat16_is_computed_in_float32():
    scores, ranks, mask = draw(40, 6)
    half = scores.astype(jnp.bfloat16)
    loss, stats = ranking_loss(half, ranks, mask)
    assert loss.dtype == jnp.float32
    assert_close((loss, stats), ranking_by_loops(half.astype(float), ranks, mask), 1e-5)
    columns = (half[:, 0], half[:, 1], half[:, 2], half[:, 3])
    with jax.enable_x64(True):
        exact = dpo_loss(*(column.astype(float) for column in columns), 0.1)
    found = dpo_loss(*columns, 0.1)
    assert found[0].dtype == jnp.float32
    assert_close(found, exact, 1e-5)
