"""The agreement of anonymous raters, against formulas written out and closed forms."""

import itertools
import math
import sys

import numpy as np
import pytest

from instar.errors import UserError
from instar.evaluation.agreement import (
    half_against_half,
    krippendorff_alpha,
    one_person,
    person_against_person,
)


def draw(seed, count, most=9, step=1.0):
    """Scores of 1 to `most` people for each text: what it deserves, with noise, rounded."""
    rng = np.random.default_rng(seed)
    return [
        (
            np.round((rng.normal(0, 2) + rng.normal(0, 1, rng.integers(1, most + 1))) / step) * step
        ).tolist()
        for _ in range(count)
    ]


def test_alpha_equals_its_definition():
    raters = draw(0, 25)
    kept = [scores for scores in raters if len(scores) > 1]
    everyone = list(itertools.chain(*kept))
    observed = sum(
        sum((a - b) ** 2 for a, b in itertools.permutations(scores, 2)) / (len(scores) - 1)
        for scores in kept
    ) / len(everyone)
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(everyone, 2))
    expected /= len(everyone) * (len(everyone) - 1)
    assert any(len(scores) == 1 for scores in raters)
    assert krippendorff_alpha(raters) == pytest.approx(1 - observed / expected, rel=1e-9)


def test_alpha_does_not_depend_on_the_order_of_scores():
    raters = draw(1, 12)
    mixed = [scores[::-1] for scores in raters]
    assert krippendorff_alpha(mixed) == pytest.approx(krippendorff_alpha(raters), rel=1e-12)


def test_alpha_at_its_ends():
    assert krippendorff_alpha([[1, 1, 1], [2, 2], [4, 4]]) == 1
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    assert math.isnan(krippendorff_alpha([[1], [2]]))
    assert math.isnan(krippendorff_alpha([]))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    with pytest.raises(UserError, match='the extra "demo"'):
        krippendorff_alpha([[1, 2]])


def test_one_person_equals_the_sum_over_all_pairs_and_people():
    raters = draw(2, 8, most=4)
    kept = [scores for scores in raters if len(scores) > 1]
    earned, weights = [], []
    for a, b in itertools.permutations(kept, 2):
        for i, j in itertools.product(range(len(a)), range(len(b))):
            others = np.mean(a[:i] + a[i + 1 :]) - np.mean(b[:j] + b[j + 1 :])
            if others != 0:
                earned.append((np.sign(a[i] - b[j]) * np.sign(others) + 1) / 2)
                weights.append(1 / len(a) / len(b))
    expected = np.average(earned, weights=weights)
    assert one_person(raters) == pytest.approx(expected, abs=0.005)


def test_two_people_equal_the_sum_over_all_pairs_and_people():
    raters = draw(3, 8, most=4)
    kept = [scores for scores in raters if len(scores) > 1]
    earned, weights = [], []
    for a, b in itertools.permutations(kept, 2):
        both = itertools.product(
            itertools.permutations(range(len(a)), 2), itertools.permutations(range(len(b)), 2)
        )
        for (i, k), (j, m) in both:
            if a[i] != b[j] and a[k] != b[m]:
                earned.append((a[i] > b[j]) == (a[k] > b[m]))
                weights.append(1 / (len(a) * (len(a) - 1) * len(b) * (len(b) - 1)))
    expected = np.average(earned, weights=weights)
    assert person_against_person(raters) == pytest.approx(expected, abs=0.005)


def test_halves_agree_as_normal_variables_do():
    """Means of n scores correlate by r = V / (V + v / n); they agree in 1/2 + asin(r) / pi."""
    rng = np.random.default_rng(4)
    raters = [rng.normal(0, 1) + rng.normal(0, 2, 8) for _ in range(1500)]
    correlation = 1 / (1 + 4 / 4)
    expected = 0.5 + math.asin(correlation) / math.pi
    assert half_against_half(raters) == pytest.approx(expected, abs=0.02)


def test_unanimous_people_agree_and_too_few_say_nothing():
    raters = [[float(i)] * 3 for i in range(6)]
    for measure in (one_person, person_against_person, half_against_half):
        assert measure(raters) == 1
        assert math.isnan(measure([]))
        assert math.isnan(measure([[1.0], [2.0]]))
