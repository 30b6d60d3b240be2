"""Figures of reward models against loops over pairs and against closed forms."""

import itertools
import math
import time

import numpy as np
import pytest

from instar.evaluation.preference_metrics import (
    accuracy_by_gap,
    calibration,
    ensemble_disagreement,
    pair_accuracy,
    pair_accuracy_interval,
)


def draw(seed, count):
    """Scores and ratings, both with ties."""
    rng = np.random.default_rng(seed)
    ratings = rng.integers(-4, 5, count) / 2
    return np.round(ratings + 2 * rng.standard_normal(count)), ratings


def untied(scores, ratings):
    """(what the pair earns, its gap in ratings, its gap in scores), better text first."""
    for i in range(len(ratings)):
        for j in range(len(ratings)):
            if ratings[i] > ratings[j]:
                earned = 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
                yield earned, ratings[i] - ratings[j], scores[i] - scores[j]


@pytest.mark.parametrize("count", [2, 7, 40])
def test_pair_accuracy_equals_loops(count):
    scores, ratings = draw(count, count)
    expected = np.mean([earned for earned, _, _ in untied(scores, ratings)])
    assert pair_accuracy(scores, ratings) == pytest.approx(expected, rel=1e-12)
    assert pair_accuracy(-scores, ratings) == pytest.approx(1 - expected, rel=1e-12)


def test_extreme_accuracies():
    ratings = np.array([1.0, 3.0, 2.0])
    assert pair_accuracy(10 * ratings, ratings) == 1
    assert pair_accuracy(np.zeros(3), ratings) == 0.5
    assert math.isnan(pair_accuracy(ratings, np.ones(3)))


def test_the_interval_equals_a_bootstrap_by_loops():
    scores, ratings = draw(1, 12)
    found = pair_accuracy_interval(scores, ratings, seed=5, resamples=30)
    counts = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), 30)
    shares = []
    for row in counts:
        chosen = np.repeat(np.arange(12), row)
        shares.append(pair_accuracy(scores[chosen], ratings[chosen]))
    assert found.value == pair_accuracy(scores, ratings)
    np.testing.assert_allclose(
        [found.low, found.high], np.percentile(shares, [2.5, 97.5]), rtol=1e-12
    )


def test_the_interval_covers_the_truth():
    """Of bivariate normal variables, P(concordant) = 1/2 + asin(correlation) / pi."""
    covered, correlation = 0, 0.6
    truth = 0.5 + math.asin(correlation) / math.pi
    rng = np.random.default_rng(0)
    for seed in range(60):
        x, noise = rng.standard_normal((2, 100))
        y = correlation * x + math.sqrt(1 - correlation**2) * noise
        found = pair_accuracy_interval(x, y, seed=seed)
        assert found.low < found.value < found.high
        covered += found.low <= truth <= found.high
    assert covered / 60 > 0.85


def test_accuracy_by_gap_equals_loops():
    scores, ratings = draw(2, 30)
    edges = [0, 0.5, 1.5, 4, 9]
    pairs = list(untied(scores, ratings))
    for (accuracy, count), low, high in zip(
        accuracy_by_gap(scores, ratings, edges), edges[:-1], edges[1:], strict=True
    ):
        inside = [earned for earned, gap, _ in pairs if low <= gap < high]
        assert count == len(inside)
        if inside:
            assert accuracy == pytest.approx(np.mean(inside))
    assert math.isnan(accuracy_by_gap(scores, ratings, [50, 60])[0][0])
    top = float(ratings.max() - ratings.min())
    assert accuracy_by_gap(scores, ratings, [top, top])[0][1] > 0  # the end belongs to it


def test_calibration_equals_loops():
    scores, ratings = draw(3, 30)
    error, curve = calibration(scores / 3, ratings, bins=4)
    bins = {}
    for earned, _, gap in untied(scores / 3, ratings):
        sure = 1 / (1 + math.exp(-abs(gap)))
        bins.setdefault(min(int((sure - 0.5) * 8), 3), []).append((sure, earned))
    expected = [(*np.mean(bins[key], axis=0), len(bins[key])) for key in sorted(bins)]
    np.testing.assert_allclose(curve, expected, rtol=1e-12)
    total = sum(len(each) for each in bins.values())
    assert error == pytest.approx(sum(abs(p - o) * n for p, o, n in expected) / total)


def test_scores_are_calibrated_where_people_choose_by_them():
    """Ratings that are scores with Gumbel noise order pairs as Bradley and Terry have it."""
    rng = np.random.default_rng(4)
    scores = 1.5 * rng.standard_normal(1000)
    ratings = scores + rng.gumbel(size=1000)
    assert calibration(scores, ratings)[0] < 0.02
    assert calibration(2 * scores, ratings)[0] > 0.05
    assert calibration(scores / 2, ratings)[0] > 0.05


def test_ensemble_disagreement_equals_loops():
    members = np.random.default_rng(5).standard_normal((3, 20))
    shares = [
        np.mean([earned for earned, _, _ in untied(members[b], members[a])])
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert ensemble_disagreement(members) == pytest.approx(1 - np.mean(shares))
    assert ensemble_disagreement(members[:1]) == 0
    assert ensemble_disagreement(members[[0, 0]]) == 0
    assert ensemble_disagreement(np.stack([members[0], -members[0]])) == 1


def test_texts_of_other_groups_are_not_compared():
    """A model that learnt from rankings is free up to a constant for each prompt."""
    rng = np.random.default_rng(7)
    groups = rng.permutation(np.repeat(np.arange(12), 4))
    ratings = rng.integers(0, 3, 48).astype(float)
    # In quarters, which no whole number rounds.
    scores = np.round(4 * (ratings + rng.standard_normal(48))) / 4
    moved = scores + rng.integers(-50, 50, 12)[groups]
    by_group = [[*untied(scores[groups == each], ratings[groups == each])] for each in range(12)]
    pairs = [*itertools.chain(*by_group)]
    expected = np.mean([earned for earned, _, _ in pairs])
    assert pair_accuracy(moved, ratings, groups) == pytest.approx(expected, rel=1e-12)
    assert abs(pair_accuracy(moved, ratings) - expected) > 0.05

    found = pair_accuracy_interval(moved, ratings, groups, seed=3, resamples=40)
    draws = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), 40)
    # Each copy of a group is one of its own.
    drawn = [itertools.chain(*(by_group[each] * row[each] for each in range(12))) for row in draws]
    shares = [np.mean([earned for earned, _, _ in each]) for each in drawn]
    np.testing.assert_allclose(
        [found.value, found.low, found.high],
        [expected, *np.percentile(shares, [2.5, 97.5])],
        rtol=1e-12,
    )

    by_gap = accuracy_by_gap(moved, ratings, [1, 1.5, 2], groups)
    assert [count for _, count in by_gap] == [sum(g == gap for _, g, _ in pairs) for gap in (1, 2)]
    error, curve = calibration(moved, ratings, groups)
    assert sum(count for *_, count in curve) == len(pairs)
    assert error == calibration(scores, ratings, groups)[0]
    assert ensemble_disagreement(np.stack([moved, scores]), groups) == 0


def test_two_thousand_texts_take_no_time():
    scores, ratings = draw(6, 2000)
    start = time.perf_counter()
    pair_accuracy(scores, ratings)
    assert time.perf_counter() - start < 2
